"""Weights & Biases: a W&B group per run, a W&B run per stage, with an id that a resume finds (docs/design/0013)."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.core.artifacts import EVALUATION, MANIFEST, Manifest, folder_name, read_manifest, write_json
from alignment.job import StageSpec
from alignment.training.trackers.tracker import Cell, Tracker, settings, tags
from alignment.training.trackers.wandb_log import last_step

TOKEN = "wandb-token.json"
"""A file beside the stage's ``wandb`` folder, which may be deleted once it is synced."""

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
    """One W&B run, online if the user is logged in, offline otherwise."""

    def __init__(self, spec: StageSpec) -> None:
        folder = _own_folder(spec)
        belongs = _belonging(spec)
        import wandb  # reads the environment

        self._wandb = wandb
        self._run = wandb.init(
            **belongs,
            group=spec.tracking.group or spec.run,
            job_type=spec.config.kind,
            name=f"{spec.run}/{spec.stage}",
            tags=tags(spec),
            resume="allow",
            mode=_mode(),
            dir=str(spec.run_folder),
            config=settings(spec),
            settings=wandb.Settings(**_PATIENCE, **_QUIET),
        )
        self._run.define_metric("*", step_metric="step")
        # The server knows the last step; offline it is in the files.
        self._step = last_step(folder, self._run.id) if self._run.offline else self._run.step - 1
        self._declare_inputs(spec)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends one step. Steps that W&B already has are skipped; their values are the same, on a GPU up to
        rounding."""
        if step > self._step:
            self._run.log({**metrics, "step": step}, step=step)
            self._step = step

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Sends a table after the last step, as a W&B step without metrics."""
        self._step += 1
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, self._step)

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the headline metrics as the run's summary, and the manifest, never weights, as an artifact."""
        self._run.summary.update(manifest.metrics)
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


def stable_id(spec: StageSpec) -> str:
    """The W&B run id of a stage, which stays the same when the stage is resumed in its folder.

    A token that is drawn once and stored there distinguishes it from the same stage of other users of the project.
    """
    token = spec.run_folder / TOKEN
    if not token.exists():
        write_json(token, secrets.token_hex(16))
    identity = f"{token.read_text(encoding='utf-8')}/{spec.run}/{spec.stage}/{spec.fingerprint}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _own_folder(spec: StageSpec) -> Path:
    """The folder for all files of W&B for this stage.

    Raises:
        OSError: it cannot be written; W&B would use the machine's temporary folder instead.
    """
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
    return {
        "project": spec.tracking.project,
        "entity": spec.tracking.entity,
        "id": stable_id(spec),
    }


def _mode() -> Any:
    """Online if this machine has credentials, else offline; it neither prompts nor connects."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
