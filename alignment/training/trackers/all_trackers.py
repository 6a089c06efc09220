"""All trackers of a stage as one. A tracker never stops a training: its first fault is reported once, and the stage
continues without it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.config.run import LABELS
from alignment.core.artifacts import Manifest
from alignment.job import StageSpec
from alignment.training.trackers.boards import TensorBoardTracker, TrackioTracker
from alignment.training.trackers.mlflow import mlflow_sender
from alignment.training.trackers.tracker import Row, TableFiles, Tracker, columns_and_rows, curves
from alignment.training.trackers.wandb import WandbTracker

log = logging.getLogger(__name__)


class Trackers:
    """Forwards everything to each tracker. Before ``start``, and on processes that never call it, there are none.
    ``faults`` holds the messages about trackers that failed."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._open: dict[str, Tracker] = {}
        self._run = ""

    def start(self, spec: StageSpec) -> None:
        """Opens the trackers that the user asked for."""
        self._run = spec.run
        tracking = spec.tracking
        wanted: dict[str, tuple[bool, Callable[[], Tracker]]] = {
            "wandb": (tracking.wandb, lambda: WandbTracker(spec, self._warn)),
            "tensorboard": (tracking.tensorboard, lambda: TensorBoardTracker(spec)),
            "mlflow": (tracking.mlflow, lambda: mlflow_sender(spec)),
            "trackio": (tracking.trackio, lambda: TrackioTracker(spec)),
        }
        asked = {LABELS[name]: make for name, (is_asked, make) in wanted.items() if is_asked}
        for label, make in asked.items():
            try:
                self._open[label] = make()
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                self._give_up(label, error)
        if asked:
            self._open["the copy of tables"] = TableFiles(spec)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.catch_up([{**metrics, "step": step}])

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends steps as ``metrics.jsonl`` has them. A resumed stage sends those that it already has, because a killed
        attempt may not have sent all of them."""
        now = time.time()
        steps = [
            Row(step=row["step"], curves=curves({key: row[key] for key in row if key != "step"}), time=now)
            for row in rows
        ]
        if steps:
            self._each(lambda tracker: tracker.log(steps))

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
        for label, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                self._give_up(label, error)

    def _give_up(self, label: str, error: Exception) -> None:
        self._open.pop(label, None)
        why = " ".join(str(error).split()) or type(error).__name__
        names = [name for name in LABELS if LABELS[name] == label]
        later = "".join(f"; to send the rest later, run: align track {self._run} --to {name}" for name in names)
        self._warn(f"{label} failed and is no longer used in this stage: {why}{later}")

    def _warn(self, message: str) -> None:
        self.faults.append(message)
        log.warning("%s", message)
