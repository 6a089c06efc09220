"""Weights & Biases: a group a run, a W&B run a stage, with an id that a resume finds (docs/design/0013)."""

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
"""Beside the stage's ``wandb`` folder, which may be deleted once it is synced."""

_PATIENCE = {"init_timeout": 30.0, "finish_timeout": 60.0, "finish_timeout_raises": True}
"""Seconds that a stage waits for a server; what did not get through by then lies in its folder for ``wandb sync``."""
_SAYS_NOTHING_MORE = {
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
"""W&B would send what is printed, command lines, git remotes with the passwords in them, names of users and hosts."""
_AGENTS = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""What an agent of a W&B sweep tells a process: the run that it will look for its figure in."""


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
            settings=wandb.Settings(**_PATIENCE, **_SAYS_NOTHING_MORE),
        )
        self._run.define_metric("*", step_metric="step")
        # A server says itself how far it is; offline the files do.
        self._step = last_step(folder, self._run.id) if self._run.offline else self._run.step - 1
        self._declare_inputs(spec)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Steps that W&B has are left out: computed again they say the same, on a GPU up to rounding."""
        if step > self._step:
            self._run.log({**figures, "step": step}, step=step)
            self._step = step

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """After the last step, as one of W&B's own steps that no metric has."""
        self._step += 1
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, self._step)

    def result(self, manifest: Manifest, folder: Path) -> None:
        """The headline figures as the run's summary; the manifest, never weights, as an artifact."""
        self._run.summary.update(manifest.metrics)
        self._run.log_artifact(self._artifact(manifest, folder))

    def close(self, *, done: bool) -> None:
        """Waits for what is on its way, and for the process that writes it to the disk."""
        self._run.finish(exit_code=0 if done else 1)
        self._wandb.teardown()

    def _declare_inputs(self, spec: StageSpec) -> None:
        """As `use_artifact` does, which waits for a server and offline does nothing but refuse."""
        for one in {**spec.inputs, **spec.arms}.values():
            if one.path is not None and (manifest := read_manifest(one.path)) is not None:
                artifact = self._artifact(manifest, one.path)
                self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def _artifact(self, manifest: Manifest, folder: Path) -> Any:
        """The same for whoever made it and whoever takes it, so that W&B finds them to be one."""
        told = self._wandb.Artifact(
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
        told.add_file(str(folder / MANIFEST), policy="immutable", skip_cache=True)
        return told


def stable_id(spec: StageSpec) -> str:
    """The W&B run id of a stage: the same whenever it goes on in its folder.

    A token that is drawn once and kept there tells it from the same stage of others who share the project.
    """
    token = spec.run_folder / TOKEN
    if not token.exists():
        write_json(token, secrets.token_hex(16))
    told = f"{token.read_text(encoding='utf-8')}/{spec.run}/{spec.stage}/{spec.fingerprint}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _own_folder(spec: StageSpec) -> Path:
    """Where W&B keeps everything of the stage.

    Raises:
        OSError: it cannot be written; W&B would go on in the machine's temporary folder.
    """
    folder = spec.run_folder / "wandb"
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    os.environ |= {"WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data")}
    os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    return folder


def _belonging(spec: StageSpec) -> dict[str, Any]:
    """Whose the W&B run is, and its id. An evaluation under an agent is the agent's run, which says all that itself."""
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
    """Whether there are credentials is looked up on this machine; nobody is asked and nothing is sent."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
