"""``align export``: a stage's result as a folder for transformers or PEFT, made in a separate process."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from alignment.core.artifacts import POLICY, REWARD_MODEL, read_manifest
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.files import new_folder
from alignment.pipeline.backends import processes
from alignment.pipeline.execute.stored_results import artifact_of, base_of

EXPORTED = (POLICY, REWARD_MODEL)


def export(console: Console, result: str, *, to: str, form: str, max_gap: float, output: Path) -> int:
    """Writes the folder ``to``; returns the exit code.

    ``result`` is an artifact's folder or ``RUN/STAGE`` of a run under ``output``.

    Raises:
        ConfigError: there is no such result, or ``to`` exists already.
        ModelError: the base of the result is missing on this machine.
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
    argv = [sys.executable, "-m", "alignment.commands.export.worker", str(folder), "--to", str(target), "--as", form]
    argv += ["--max-gap", str(max_gap)]
    if manifest.base["source"] != "self":
        argv += ["--base", str(base_of(manifest, folder, console))]
    if not Path(result).expanduser().is_dir():
        argv += ["--run", result.partition("/")[0]]
    code = processes.call(argv)
    if code == 0:
        console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
    return code
