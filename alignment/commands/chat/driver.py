"""``align chat``: a conversation with one or two policies of a run, in a separate process."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.config.did_you_mean import suggestion
from alignment.core.artifacts import MANIFEST, Manifest, read_manifest
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.files import write_text
from alignment.pipeline.backends import processes
from alignment.pipeline.execute.display import display_for
from alignment.pipeline.execute.stored_results import artifact_of, base_of
from alignment.pipeline.plan.references import BASE
from alignment.pipeline.sources import model_sources
from alignment.records.run import FILE, RunRecord

MOST_ARMS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaker:
    """A policy that answers: an ``artifact`` on its ``base``, or the bare base; ``described`` is a description."""

    name: str
    described: str
    artifact: str | None
    base: str | None
    dtype: str
    chat_template: str | None = None


def chat(
    console: Console,
    result: str,
    arms: Sequence[str],
    *,
    options: Mapping[str, Any],
    engine: Mapping[str, Any] | None,
    output: Path,
) -> int:
    """Runs a chat until the user ends it; returns the exit code.

    ``result`` is a run under ``output``, or a result that ``align export`` takes. ``arms`` are stages of that run,
    ``base``, or such results; by default it is the run's last finished policy. ``options`` are the fields of
    ``GenerationOptions``. ``engine`` are settings of ``SamplingConfig``; None if the policies answer themselves.

    Raises:
        ConfigError: there is no such run, stage or result; a result is not a policy; there are more than two arms; or
            an option is invalid.
        ArtifactError: a stage has no result yet.
        ModelError: a base is missing on this machine.
    """
    _refuse_options(options)
    if len(arms) > MOST_ARMS:
        raise ConfigError(f"{len(arms)} arms; two at most fit side by side", where="--arm", remedy="name one or two")
    finder = _Finder(console, result, output)
    speakers = [finder.speaker(arm) for arm in arms or [finder.default()]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.json"
        write_text(
            file, json.dumps({"sessions": list(map(asdict, speakers)), "options": dict(options), "engine": engine})
        )
        argv = [sys.executable, "-m", "alignment.commands.chat.worker", str(file)]
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops an answer, which the worker handles
        try:
            return processes.call(argv)
        finally:
            signal.signal(signal.SIGINT, before)


def _refuse_options(options: Mapping[str, Any]) -> None:
    if options["max_new_tokens"] < 1:
        raise ConfigError(
            f"{options['max_new_tokens']} is not a valid length", where="--max-new-tokens", remedy="give 1 or more"
        )
    if not 0 <= options["temperature"] < float("inf"):
        raise ConfigError(
            f"{options['temperature']} is not a valid temperature",
            where="--temperature",
            remedy="give 0 (greedy) or more",
        )


class _Finder:
    """Resolves the arguments of the command line, within a run if the first argument names one."""

    def __init__(self, console: Console, result: str, output: Path) -> None:
        self._console = console
        self._result = result
        self._output = output
        is_artifact = (Path(result).expanduser() / MANIFEST).is_file()
        is_run = (output / "runs" / result / FILE).is_file() and not is_artifact
        self._record = RunRecord.read(output / "runs" / result) if is_run else None

    def default(self) -> str:
        """The last finished policy of the run, or the result itself."""
        if self._record is None:
            return self._result
        for name, stage in reversed(self._record.stages.items()):
            manifest = read_manifest(Path(stage.artifact))
            if manifest is not None and manifest.kind == "policy":
                return str(name)
        raise ArtifactError(
            "no stage of this run has made a policy yet", where=self._result, remedy="run it, or chat with --arm base"
        )

    def speaker(self, arm: str) -> Speaker:
        """The policy that ``arm`` names."""
        if arm == BASE:
            return self._bare()
        stages = {} if self._record is None else self._record.stages
        name = arm.removeprefix("stage:")
        if name in stages:
            return self._of(Path(stages[name].artifact), name)
        if self._record is not None and "/" not in arm:
            raise ConfigError(
                f"run {self._result!r} has no stage {arm!r}; {suggestion(name, [*stages, BASE])}",
                where="--arm",
                remedy="name a stage of another run as RUN/STAGE, and a folder by its path",
            )
        return self._of(
            artifact_of(arm, self._output), arm.rstrip("/").rpartition("/")[2] if Path(arm).is_dir() else arm
        )

    def _of(self, folder: Path, name: str) -> Speaker:
        manifest = _policy(folder)
        own = manifest.base["source"] == "self"
        return Speaker(
            name=name,
            described=f"{folder.name}" + ("" if own else f" on {manifest.base['source']}"),
            artifact=str(folder),
            base=None if own else str(base_of(manifest, folder, self._console)),
            dtype=manifest.identity["base"]["dtype"],
        )

    def _bare(self) -> Speaker:
        """The run's base model, or that of the result."""
        if self._record is None:
            folder = artifact_of(self._result, self._output)
            manifest = _policy(folder)
            if manifest.base["source"] == "self":
                raise ConfigError(
                    f"{folder.name} holds whole weights and has no base", where="--arm", remedy="name another arm"
                )
            where, source = base_of(manifest, folder, self._console), manifest.base["source"]
            return Speaker(name=BASE, described=source, artifact=None, base=str(where), dtype=_dtype(manifest))
        model = self._record.config["model"]
        base = model_sources.resolve(model["source"], where="model.source")
        if not base.ready:
            base = model_sources.fetch(base, announce=display_for(self._console).note)
        return Speaker(
            name=BASE,
            described=model["source"],
            artifact=None,
            base=str(base.folder),
            dtype=model["dtype"],
            chat_template=model.get("chat_template"),
        )


def _dtype(manifest: Manifest) -> str:
    return str(manifest.identity["base"]["dtype"])


def _policy(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    if manifest.kind != "policy":
        raise ConfigError(f"{folder.name} is of kind {manifest.kind}; only a policy can chat", where="--arm")
    return manifest
