"""The policies that a command line names: stages of a run, its base, results of other runs, and artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.config.faults import suggestion
from alignment.config.model import TemplateChoice
from alignment.core.artifacts import MANIFEST, POLICY, TOKENIZER, Manifest, read_manifest
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.fingerprint import digest
from alignment.data.chat_template import CHATML, PATH
from alignment.data.templates import TEMPLATE_FILE
from alignment.pipeline.execute.display import announcer
from alignment.pipeline.execute.stored_results import artifact_of, base_of, recorded_base, result_of
from alignment.pipeline.plan.references import BASE
from alignment.pipeline.sources import model_sources
from alignment.records.run import FILE, RunRecord
from alignment.report.run_page.run_records import artifact_folder


class PolicyFinder:
    """Resolves the arguments of a command line, within a run under ``output`` if ``result`` names one."""

    def __init__(self, console: Console, result: str, output: Path) -> None:
        self._console = console
        self._result = result
        self._output = output
        is_artifact = (Path(result).expanduser() / MANIFEST).is_file()
        self._run_folder = output / "runs" / result
        is_run = (self._run_folder / FILE).is_file() and not is_artifact
        self._record = RunRecord.read(self._run_folder) if is_run else None

    def policies(self, arms: Sequence[str]) -> list[StoredPolicy]:
        """The policies that ``arms`` name, or without any the last finished one of the run, or the result itself.
        Raises ConfigError, ArtifactError, ModelError."""
        return [self._policy(arm) for arm in arms or [self._default()]]

    def _default(self) -> str:
        if self._record is None:
            return self._result
        if name := next((name for name, made in self._last_manifests(self._record) if made.kind == POLICY), None):
            return name
        message = "no stage of this run has produced a policy yet"
        raise ArtifactError(message, where=self._result, remedy="run the recipe, or use --arm base")

    def _policy(self, arm: str) -> StoredPolicy:
        if arm == BASE:
            return self._bare()
        stages = {} if self._record is None else self._record.stages
        name = arm.removeprefix("stage:")
        if name in stages:
            return self._of(result_of(self._run_folder, name, stages[name]), name)
        if self._record is not None and "/" not in arm:
            message = f"run {self._result!r} has no stage {arm!r}; {suggestion(name, [*stages, BASE])}"
            remedy = "name a stage of another run as RUN/STAGE, and a folder by its path"
            raise ConfigError(message, where="--arm", remedy=remedy)
        shown = arm.rstrip("/").rpartition("/")[2] if Path(arm).is_dir() else arm
        return self._of(artifact_of(arm, self._output, self._console), shown)

    def _of(self, folder: Path, name: str) -> StoredPolicy:
        manifest = _manifest_of_policy(folder)
        own = manifest.base["source"] == "self"
        return StoredPolicy(
            name=name,
            described=f"{folder.name}" + ("" if own else f" on {manifest.base['source']}"),
            artifact=str(folder),
            base=None if own else str(base_of(manifest, folder, self._console)),
            dtype=manifest.identity["base"]["dtype"],
        )

    def _bare(self) -> StoredPolicy:
        """The run's base model, or that of the result."""
        if self._record is None:
            folder = artifact_of(self._result, self._output, self._console)
            manifest = _manifest_of_policy(folder)
            source, dtype = manifest.base["source"], manifest.identity["base"]["dtype"]
            if source == "self":
                message = f"{folder.name} contains whole weights and has no base"
                raise ConfigError(message, where="--arm", remedy="name another arm")
            base: Path | None = base_of(manifest, folder, self._console)
            template = _template_of(manifest, folder)
        else:
            model = self._record.config["model"]
            source, dtype, base = model["source"], model["dtype"], self._base_of_run(self._record, model["source"])
            template = TemplateChoice(source=model.get("chat_template"), options=model.get("template_options", {}))
        return StoredPolicy(
            name=BASE,
            described=source,
            artifact=None,
            base=str(base),
            dtype=dtype,
            chat_template=template.source,
            template_options=template.options,
        )

    def _last_manifests(self, record: RunRecord) -> Iterator[tuple[str, Manifest]]:
        for name, stage in reversed(record.stages.items()):
            folder = artifact_folder(self._run_folder, name, stage)
            manifest = None if folder is None else read_manifest(folder)
            if manifest is not None:
                yield name, manifest

    def _base_of_run(self, record: RunRecord, source: str) -> Path | None:
        """The folder of the run's base model, if possible the one from which its stages started."""
        with suppress(ArtifactError):  # a damaged result has nothing to do with the base
            for _, manifest in self._last_manifests(record):
                if (folder := recorded_base(manifest)) is not None:
                    return folder
        base = model_sources.resolve(source, where="model.source")
        return base.folder if base.ready else model_sources.fetch(base, announce=announcer(self._console)).folder


def _template_of(manifest: Manifest, folder: Path) -> TemplateChoice:
    """The chat template of the run that made an artifact, for its base."""
    base = manifest.identity["base"]
    replaced, options = base.get("chat_template"), base.get("template_options", {})
    if replaced is None:
        return TemplateChoice(options=options)
    if replaced == digest(CHATML):  # which chooses the token that ends a turn as well
        return TemplateChoice(source=CHATML, options=options)
    return TemplateChoice(source=f"{PATH}{folder / TOKENIZER / TEMPLATE_FILE}")  # saved with its options


def _manifest_of_policy(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None and (folder / "config.json").is_file():
        remedy = "name a result as RUN/STAGE; exported folders are for other programs"
        raise ConfigError("is a folder with a model, not the result of a stage", where=str(folder), remedy=remedy)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    if manifest.kind != POLICY:
        raise ConfigError(f"{folder.name} is of kind {manifest.kind}; only a policy can answer prompts", where="--arm")
    return manifest
