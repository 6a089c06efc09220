"""All trackers of a stage as one.

A tracker never stops a training: its first fault is reported once, and the stage continues without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.core.artifacts import Manifest
from alignment.job import StageSpec
from alignment.training.trackers.tensorboard import TensorBoardTracker
from alignment.training.trackers.tracker import Tracker, columns_and_rows
from alignment.training.trackers.wandb import WandbTracker

log = logging.getLogger(__name__)


class Trackers:
    """Forwards everything to each tracker. Before ``start``, and on processes that never call it, there are none.

    ``faults`` holds the messages about trackers that failed.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._open: dict[str, Tracker] = {}

    def start(self, spec: StageSpec) -> None:
        """Opens the trackers that the user asked for."""
        wanted: dict[str, tuple[bool, Callable[[StageSpec], Tracker]]] = {
            "Weights & Biases": (spec.tracking.wandb, WandbTracker),
            "TensorBoard": (spec.tracking.tensorboard, TensorBoardTracker),
        }
        for name, (asked, tracker) in wanted.items():
            if asked:
                try:
                    self._open[name] = tracker(spec)
                except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                    self._give_up(name, error)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends one step."""
        self._each(lambda tracker: tracker.log(step, metrics))

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the steps that a resumed stage already has, because a killed attempt may not have sent all of them."""
        for row in rows:
            self.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows as a table, if there are any."""
        if rows:
            columns, cells = columns_and_rows(rows)
            self._each(lambda tracker: tracker.table(name, columns, cells))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the artifact that was published in ``folder``."""
        self._each(lambda tracker: tracker.result(manifest, folder))

    def close(self, *, done: bool) -> None:
        """Flushes what was sent; ``done`` is True if the stage has finished."""
        self._each(lambda tracker: tracker.close(done=done))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        why = " ".join(str(error).split()) or type(error).__name__
        self.faults.append(f"{name} failed and is no longer used in this stage: {why}")
        log.warning("%s", self.faults[-1])
