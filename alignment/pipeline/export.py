"""``align export``: a stage's result as a folder that transformers or PEFT reads, made in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from alignment import launcher
from alignment.artifacts import Manifest, read_manifest
from alignment.config.near import suggestion
from alignment.errors import ArtifactError, ConfigError, ModelError
from alignment.pipeline import sources
from alignment.pipeline.display import display_for
from alignment.pipeline.record import FILE, read_record

EXPORTED = ("policy", "reward")


def export(console: Console, result: str, *, to: str, form: str, max_gap: float, output: Path) -> int:
    """Writes the folder ``to``; returns the exit code.

    ``result`` is an artifact's folder or ``RUN/STAGE`` of a run under ``output``.

    Raises:
        ConfigError: there is no such result, or ``to`` is taken.
        ModelError: the base that it stands on is not here.
    """
    folder = artifact_of(result, output)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    if manifest.kind not in EXPORTED:
        raise ConfigError(
            f"{folder.name} is of kind {manifest.kind}; a policy or a reward model can be exported", where=result
        )
    target = new_folder(to)
    argv = [sys.executable, "-m", "alignment.export", str(folder), "--to", str(target), "--as", form]
    argv += ["--max-gap", str(max_gap)]
    if manifest.base["source"] != "self":
        argv += ["--base", str(base_of(manifest, folder, console))]
    if not Path(result).expanduser().is_dir():
        argv += ["--run", result.partition("/")[0]]
    environment = launcher.environment(launcher.count_cores(), os.environ.get("PYTHONPATH", ""))
    code = subprocess.run(argv, env={**os.environ, **environment}, check=False).returncode
    if code == 0:
        console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
    return code


def new_folder(to: str) -> Path:
    """Where a command writes.

    Raises:
        ConfigError: it is taken, or has no place.
    """
    target = Path(to).expanduser().absolute()
    if target.exists() or not target.parent.is_dir():
        why = "exists already" if target.exists() else "lies in a folder that does not exist"
        raise ConfigError(f"{to!r} {why}", where="--to", remedy="name a new folder inside one that is there")
    return target


def artifact_of(result: str, output: Path) -> Path:
    """The folder of a result: an artifact's own, or that of ``RUN/STAGE`` of a run under ``output``.

    Raises:
        ConfigError: there is no such folder, run or stage.
    """
    folder = Path(result).expanduser()
    if folder.is_dir():
        return folder.absolute()
    run, _, stage = result.partition("/")
    runs = sorted(path.parent.name for path in (output / "runs").glob(f"*/{FILE}"))
    if run not in runs:
        raise ConfigError(
            f"{result!r} is no folder, and there is no run {run!r} under {output / 'runs'}; {suggestion(run, runs)}",
            where="RESULT",
            remedy="name an artifact's folder, or RUN/STAGE",
        )
    stages = read_record(output / "runs" / run)["stages"]
    if stage not in stages:
        raise ConfigError(f"run {run!r} has no stage {stage!r}; {suggestion(stage, stages)}", where="RESULT")
    return Path(stages[stage]["artifact"])


def base_of(manifest: Manifest, artifact: Path, console: Console) -> Path:
    """The folder of the base, checked by content where the manifest recorded that.

    Raises:
        ModelError: it is gone, or another one now.
    """
    recorded, there = manifest.base["content"], Path(manifest.base["path"])
    if recorded is None:
        if (there / "config.json").is_file():
            return there
        raise ModelError("the base that it stands on is gone", where=str(there), remedy="put it there again")
    model = sources.resolve(manifest.base["source"], where=str(artifact))
    if not model.ready:
        model = sources.fetch(model, announce=display_for(console).note)
    if model.identity != recorded or model.folder is None:
        raise ModelError(
            f"{manifest.base['source']} is another model now than the one that {artifact.name} stands on",
            where=str(artifact),
            remedy=f"bring back the one with identity {recorded}",
        )
    return model.folder
