"""Weights & Biases: a W&B group per run, a W&B run per stage, with an id that a resume finds (docs/design/0013)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.core.artifacts import EVALUATION, MANIFEST, Manifest, folder_name, read_manifest
from alignment.job import StageSpec
from alignment.training.trackers.tracker import Cell, Row, Tracker, curve_name, settings, stable_id, tags

_HEADER, _CHUNK, _BLOCK = 7, 7, 1 << 15
_MAGIC = b":W&B"
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """The records of a file in order, up to the point where a killed process stopped writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    if not data.startswith(_MAGIC):
        return
    offset, message = _HEADER, b""
    while offset + _CHUNK <= len(data):
        if (left := _BLOCK - offset % _BLOCK) < _CHUNK:
            offset += left
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        chunk = data[offset + _CHUNK : offset + _CHUNK + length]
        if kind == 0 or len(chunk) < length:
            return
        message = chunk if kind in (_WHOLE, _FIRST) else message + chunk
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(message)
        offset += _CHUNK + length


def logged(folder: Path, run_id: str) -> tuple[int, set[str]]:
    """The last step of a run in the files below ``folder``, or 0 if there is none, and the names that it has."""
    step, names = 0, set()
    for file in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for record in records(file):
            if record.HasField("history"):
                step = max(step, record.history.step.num)
                names |= {item.nested_key[0] if item.nested_key else item.key for item in record.history.item}
    return step, names


_PATIENCE = {"init_timeout": 30.0, "finish_timeout": 60.0, "finish_timeout_raises": True}
"""Seconds that a stage waits for a server; what was not sent by then stays in its folder for ``wandb sync``."""
_QUIET = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "silent": True,
    "symlink": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
"""Without these W&B would send printed text, command lines, git remotes with passwords, and user and host names."""
_AGENTS = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""Variables that an agent of a W&B sweep sets: the run in which it looks for its metric."""


class WandbTracker(Tracker):
    """One W&B run, online if the user is logged in, offline otherwise and if the server does not answer. ``warn`` takes
    a message for the user."""

    def __init__(self, spec: StageSpec, warn: Callable[[str], None]) -> None:
        folder = _own_folder(spec)
        import wandb  # reads the environment

        self._wandb = wandb
        self._run = self._begun(spec, warn)
        self._run.define_metric("*", step_metric="step")
        # The server knows what it has; offline it is in the files.
        self._step: int
        self._known: set[str]
        if self._run.offline:
            self._step, self._known = logged(folder, self._run.id)
        else:
            self._step, self._known = self._run.step - 1, set(self._run.summary.keys())
        self._declare_inputs(spec)

    def _begun(self, spec: StageSpec, warn: Callable[[str], None]) -> Any:
        arguments = {
            **_belonging(spec),
            "group": spec.tracking.group or spec.run,
            "job_type": spec.config.kind,
            "name": f"{spec.run}/{spec.stage}",
            "tags": tags(spec),
            "resume": "allow",
            "dir": str(spec.run_folder),
            "config": settings(spec),
            "settings": self._wandb.Settings(**_PATIENCE, **_QUIET),
        }
        mode = _mode()
        try:
            return self._wandb.init(**arguments, mode=mode)
        except self._wandb.errors.CommError as error:
            if mode != "online":
                raise
            why = " ".join(str(error).split())
            warn(
                f"Weights & Biases did not start a run online, so this stage is tracked offline ({why}); send it later "
                f"with: wandb sync {spec.run_folder}/wandb/offline-run-*"
            )
            self._wandb.teardown()  # its process still holds the id
            return self._wandb.init(**arguments, mode="offline")

    def log(self, rows: Sequence[Row]) -> None:
        """Sends steps. Those that W&B already has are skipped; their values are the same, on a GPU up to rounding."""
        for row in rows:
            if row.step > self._step:
                self._run.log({**row.curves, "step": row.step}, step=row.step)
                self._step = row.step

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Sends a table after the last step, as a W&B step without metrics, unless an earlier attempt did."""
        if name not in self._known:
            self._step += 1
            content = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({name: content}, self._step)

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the headline metrics as the run's summary, and the manifest, never weights, as an artifact."""
        self._run.summary.update({curve_name(name): value for name, value in manifest.metrics.items()})
        self._run.log_artifact(self._artifact(manifest, folder))

    def close(self, *, done: bool) -> None:
        """Waits until everything is sent, and until W&B's process has written it to the disk."""
        self._run.finish(exit_code=0 if done else 1)
        self._wandb.teardown()

    def _declare_inputs(self, spec: StageSpec) -> None:
        """Like `use_artifact`, which waits for a server and fails offline."""
        for stage_input in {**spec.inputs, **spec.arms}.values():
            if stage_input.path is not None and (manifest := read_manifest(stage_input.path)) is not None:
                artifact = self._artifact(manifest, stage_input.path)
                self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def _artifact(self, manifest: Manifest, folder: Path) -> Any:
        """A W&B artifact that is equal for its producer and its consumers, so that W&B identifies them."""
        artifact = self._wandb.Artifact(
            folder_name(manifest.stage, manifest.fingerprint),
            type=manifest.kind,
            metadata={
                "fingerprint": manifest.fingerprint,
                "inputs": manifest.inputs,
                "base": manifest.base,
                "adapters": manifest.adapters,
                "metrics": manifest.metrics,
                "git_commit": manifest.git_commit,
                "created": manifest.created,
            },
        )
        artifact.add_file(str(folder / MANIFEST), policy="immutable", skip_cache=True)
        return artifact


def _own_folder(spec: StageSpec) -> Path:
    """The folder for all files of W&B for this stage. Raises OSError: it cannot be written; W&B would use the machine's
    temporary folder instead."""
    folder = spec.run_folder / "wandb"
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    os.environ |= {"WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data")}
    os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    return folder


def _belonging(spec: StageSpec) -> dict[str, Any]:
    """Owner and id of the W&B run. For an evaluation under an agent they are empty: the agent sets them."""
    if "WANDB_SWEEP_ID" in os.environ and spec.produces == EVALUATION:
        return {}
    for name in _AGENTS:
        os.environ.pop(name, None)
    return {"project": spec.tracking.project, "entity": spec.tracking.entity, "id": stable_id(spec)}


def _mode() -> Any:
    """Online if this machine has credentials, else offline; it neither prompts nor connects."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
