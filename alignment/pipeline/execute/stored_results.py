"""Results that a user names, by ``RUN/STAGE`` or by folder, and the base models that they need."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from alignment.config.faults import suggestion
from alignment.config.model import ModelConfig
from alignment.core.artifacts import FROM_OUTSIDE, POLICY, TOKENIZER, Manifest, folder_name, publish, read_manifest
from alignment.core.errors import ArtifactError, ConfigError, ModelError
from alignment.core.fingerprint import digest
from alignment.core.locks import held
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from alignment.pipeline.execute.display import Announce, announcer
from alignment.pipeline.plan import references
from alignment.pipeline.plan.plan import Plan, PlannedStage, made_again
from alignment.pipeline.sources import bundled_model, data_sources, model_sources
from alignment.pipeline.sources.model_sources import ModelSource
from alignment.pipeline.sources.peft_adapters import read_adapter, refuse_other_base
from alignment.records.run import FILE, RunRecord, StageEntry
from alignment.report.run_page.run_records import artifact_folder
from alignment.stages.registry import kind_of

_OF_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt")


def artifact_of_adapter(source: str, console: Console) -> Path:
    """The folder of an artifact in the cache with the adapter of a source, and the tokenizer that belongs to it. It is
    made at the first call; the adapter and its base model are downloaded if they are a hub's. Raises ModelError: the
    adapter is not supported, names no base model that is here or on a hub, or does not fit it."""
    folder = _here(source, where=source, console=console).folder
    assert folder is not None, "it is on this machine"
    adapter = read_adapter(folder, where=source)
    if not adapter.base:
        message = "names no base model that is on this machine or on a hub"
        remedy = "set base_model_name_or_path to the folder or the name of its base model"
        raise ModelError(message, where=str(folder / ADAPTER_CONFIG), remedy=remedy)
    base = _here(adapter.base, where=source, console=console)
    refuse_other_base(adapter, base, where=source)
    fingerprint = digest([model_sources.identity_of_folder(folder), base.identity])
    artifact = bundled_model.cache_root() / "adapters" / folder_name(FROM_OUTSIDE, fingerprint)
    artifact.parent.mkdir(parents=True, exist_ok=True)
    with held(artifact.with_suffix(".lock"), wait=True):
        if read_manifest(artifact) is None:
            _publish(folder, base, artifact, fingerprint)
    return artifact


def _here(source: str, *, where: str, console: Console) -> ModelSource:
    model = model_sources.resolve(source, where=where, adapter_fits=True)
    return model if model.ready else model_sources.fetch(model, announce=announcer(console))


def _publish(folder: Path, base: ModelSource, artifact: Path, fingerprint: str) -> None:
    assert base.folder is not None, "it is on this machine"
    own = f"adapters/0-{folder.name}"
    with tempfile.TemporaryDirectory(dir=artifact.parent) as scratch:
        content = Path(scratch) / "content"
        for part in (own, TOKENIZER):
            (content / part).mkdir(parents=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, content / own / name)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        for file in (file for form in _OF_TOKENIZER for file in (folder if has_tokenizer else base.folder).glob(form)):
            shutil.copyfile(file, content / TOKENIZER / file.name)
        manifest = Manifest(
            stage=FROM_OUTSIDE,
            kind=POLICY,
            fingerprint=fingerprint,
            identity={"kind": FROM_OUTSIDE, "base": {"content": base.identity, "dtype": ModelConfig().dtype.value}},
            base={"source": base.source, "path": str(base.folder), "content": base.identity},
            adapters=[own],
        )
        publish(content, artifact, manifest)


def artifact_of(result: str, output: Path, console: Console) -> Path:
    """The folder of a result: an artifact's own, that of ``RUN/STAGE`` under ``output``, or that of an adapter that
    PEFT saved, named as in a recipe or by its folder. Raises ConfigError: there is no such folder, run or stage;
    ArtifactError: there is no result yet; ModelError: the adapter or its base cannot be used."""
    folder = Path(result.removeprefix("path:")).expanduser()
    if result.startswith("hub:") or (is_adapter(folder) and read_manifest(folder) is None):
        return artifact_of_adapter(result if result.startswith("hub:") else f"path:{folder}", console)
    if folder.is_dir():
        return folder.absolute()
    run, _, stage = result.partition("/")
    runs = sorted(path.parent.name for path in (output / "runs").glob(f"*/{FILE}"))
    if run not in runs:
        raise ConfigError(
            f"is not a folder, and there is no such run under {output / 'runs'}; {suggestion(run, runs)}",
            where=result,
            remedy="name an artifact's folder, or RUN/STAGE",
        )
    run_folder = output / "runs" / run
    stages = RunRecord.read(run_folder).stages
    if stage not in stages:
        raise ConfigError(f"the run has no stage {stage!r}; {suggestion(stage, stages)}", where=result)
    return result_of(run_folder, stage, stages[stage])


def result_of(run_folder: Path, stage: str, entry: StageEntry) -> Path:
    """The folder of a stage's result, also if the run was moved together with its artifacts. Raises ArtifactError: it
    has none yet."""
    folder = artifact_folder(run_folder, stage, entry)
    if folder is None:
        raise ArtifactError("no result yet", where=str(run_folder / stage), remedy="run the stage that makes it")
    return folder


def recorded_base(manifest: Manifest) -> Path | None:
    """The folder in which the base model was, if the manifest recorded its content and it is still there."""
    base = manifest.base
    if base.get("content") is None:
        return None
    return model_sources.unchanged(base["source"], Path(base["path"]), identity=base["content"])


def base_of(manifest: Manifest, artifact: Path, console: Console) -> Path:
    """The folder of the base model, whose content is checked if the manifest recorded it. Raises ModelError: it is
    missing, or has changed."""
    recorded, there = manifest.base["content"], Path(manifest.base["path"])
    if recorded is None:
        if (there / "config.json").is_file():
            return there
        raise ModelError("the base model of the result is missing", where=str(there), remedy="restore it")
    if (folder := recorded_base(manifest)) is not None:
        return folder
    model = model_sources.resolve(manifest.base["source"], where=str(artifact))
    if not model.ready:
        model = model_sources.fetch(model, announce=announcer(console))
    if model.identity != recorded or model.folder is None:
        message = f"{manifest.base['source']} is no longer the base model of {artifact.name}: its content has changed"
        raise ModelError(message, where=str(artifact), remedy=f"restore the model with the identity {recorded}")
    return model.folder


def with_inputs(plan: Plan, only: str, announce: Announce) -> Plan:
    """The plan, if the stage named ``only`` has all its inputs. A result is named after the commits of hubs' models and
    data, so a branch that is not here is downloaded before a result counts as missing. Raises ConfigError: there is no
    such stage, or an input's stage has not been run; ModelError, DataError: something cannot be downloaded."""
    if only not in plan.config.stages:
        raise ConfigError(f"no stage '{only}' in this recipe; {suggestion(only, plan.config.stages)}", where="--stage")
    absent = _missing(plan, only)
    unnamed = (stage.artifact.parent.glob(f"{stage.name}-*") for stage in plan.stages if stage.name in absent)
    if absent and (plan.store is not None or any(map(any, unnamed))):  # results whose names the plan cannot know yet
        names = [only]
        for name in names:  # which grows meanwhile
            names += [other for other in references.inputs_of(name, plan.config.stages) if other not in names]
        plan = with_models(plan, announce, stages=[stage for stage in plan.stages if stage.name in names])
    if missing := _missing(plan, only):
        verify = ["--verify"] if plan.verified else []
        command = shlex.join(["align", "run", plan.recipe, *plan.overrides, "--stage", missing[0], *verify])
        message = f"{only} needs the result of {', '.join(missing)}, which does not exist for these settings yet"
        remedy = f"first run: {command}; or leave out --stage to run all stages"
        raise ConfigError(message, where="--stage", remedy=remedy)
    return plan


def _missing(plan: Plan, only: str) -> list[str]:
    reused = {stage.name for stage in plan.stages if not stage.has_to_run}
    if only in reused:
        return []
    return [name for name in references.inputs_of(only, plan.config.stages) if name not in {*reused, only}]


def not_reused(stages: Iterable[PlannedStage]) -> list[PlannedStage]:
    """The stages that have to run and need models or data."""
    waiting = [stage for stage in stages if stage.has_to_run]
    return [stage for stage in waiting if not kind_of(stage.config).in_driver]


def with_models(plan: Plan, announce: Announce, *, stages: Sequence[PlannedStage]) -> Plan:
    """The plan with every model and all data that these stages need on this machine. A download pins a hub's source to
    a commit, and its rows have not been checked yet, so the plan is made again. An adapter names its base model only
    once it is here. Raises ModelError, DataError: something cannot be fetched."""
    if not fetch_missing([(plan, stages)], announce):
        return plan
    complete = made_again(plan)
    if not complete.base.ready:
        model_sources.fetch(complete.base, announce=announce)
        complete = made_again(plan)
    return complete


def fetch_missing(plans: Iterable[tuple[Plan, Sequence[PlannedStage]]], announce: Announce) -> bool:
    """Fetches, once each, what these stages of the plans need and is not on this machine; returns whether that was
    anything. Without stages, nothing is downloaded. Raises ModelError, DataError: something cannot be fetched."""
    needed = [(plan, stages) for plan, stages in plans if stages]
    every_model = [model for plan, _ in needed for model in (plan.base, *plan.sources.values())]
    models = {model.source: model for model in every_model if not model.ready}
    data = {
        source.source: source
        for _, stages in needed
        for stage in stages
        for source in stage.hub_data
        if not source.complete
    }
    for model in models.values():
        model_sources.fetch(model, announce=announce)
    for source in data.values():
        data_sources.fetch(source, announce=announce)
    return bool(models or data)
