"""Weights & Biases beside ``metrics.jsonl``: one group a run, one W&B run a stage, with an id that a resume finds.

A tracker never stops a training: when it fails, that is said once and the stage goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.config.tracking import TrackerKind
from alignment.config.typed import to_plain
from alignment.training.context import StageContext

log = logging.getLogger(__name__)


class Tracker:
    """Where steps go besides the file. Use ``open_tracker``; without W&B it does nothing."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Sends one step."""
        self._guarded(lambda run: run.log(figures, step=step))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows of the same fields as a table; fields that hold more than one value become JSON."""
        if rows:
            self._guarded(lambda run: run.log({name: _table(rows)}))

    def summarise(self, metrics: dict[str, float]) -> None:
        """Sets the headline figures of the stage."""
        self._guarded(lambda run: run.summary.update(metrics))

    def close(self) -> None:
        """Flushes what was sent."""
        self._guarded(lambda run: run.finish())

    def _guarded(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
            log.warning("Weights & Biases failed and is not used any more in this stage: %s", error)
            self._run = None


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    columns = list(rows[0])
    cells = [[json.dumps(row[c]) if isinstance(row[c], (dict, list)) else row[c] for c in columns] for row in rows]
    return wandb.Table(columns=columns, data=cells)


def open_tracker(context: StageContext) -> Tracker:
    """A tracker for this stage on the main process; online if the user is logged in, offline otherwise."""
    spec = context.spec
    if spec.tracking.kind is not TrackerKind.wandb or not context.is_main:
        return Tracker(None)
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        # Whether there are credentials is looked up on this machine; nobody is asked and nothing is sent.
        logged_in = "WANDB_MODE" not in os.environ and wandb.login(prompt=False, verify=False)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
        run = wandb.init(
            project=spec.tracking.project,
            group=spec.run,
            job_type=spec.config.kind,
            name=f"{spec.run}/{spec.stage}",
            id=stable_id(spec.run, spec.stage, spec.fingerprint),
            resume="allow",
            mode=mode,
            dir=str(spec.run_folder),
            config=to_plain(spec.config),
        )
    except Exception as error:  # noqa: BLE001 - no tracker is a reason to warn, not to lose a training
        log.warning("Weights & Biases could not start and is not used in this stage: %s", error)
        return Tracker(None)
    return Tracker(run)


def stable_id(run: str, stage: str, fingerprint: str) -> str:
    """The W&B run id of a stage: the same whenever the same stage of the same run goes on."""
    return hashlib.sha256(f"{run}/{stage}/{fingerprint}".encode()).hexdigest()[:16]
