"""All trackers of a stage as one. None of them ever stops a training: the first fault of one is said, once, and the
stage goes on without it."""

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
    """Hands everything on to each tracker; before ``start``, and on processes that never call it, there are none.

    ``faults`` are what was said of those that failed.
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

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Sends one step."""
        self._each(lambda tracker: tracker.log(step, figures))

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the steps that a resumed stage has kept, of which an attempt that was killed may not have sent all."""
        for row in rows:
            self.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows as a table; nothing where there are none."""
        if rows:
            columns, cells = columns_and_rows(rows)
            self._each(lambda tracker: tracker.table(name, columns, cells))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the artifact that was published in ``folder``."""
        self._each(lambda tracker: tracker.result(manifest, folder))

    def close(self, *, done: bool) -> None:
        """Flushes what was sent; ``done``: the stage came to its end."""
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
        self.faults.append(f"{name} failed and is not used any more in this stage: {why}")
        log.warning("%s", self.faults[-1])
