"""Reports a stage's curve to the study while the stage runs, so that a hopeless trial is stopped early."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.config.faults import suggestion
from alignment.config.sweep import Pruner
from alignment.core.errors import ArtifactError, ConfigError
from alignment.pipeline.sweeps.sweep_file import Sweep
from alignment.records import training
from alignment.records.run import FILE, RunRecord, StageEntry
from alignment.records.training import METRICS, written_rows


class Curve:
    """The metric by which a trial is pruned, if pruning is on."""

    def __init__(self, wanted: Sweep, trial: Any) -> None:
        self._config = wanted.config.pruning
        self._run_folder = wanted.output / "runs" / trial.user_attrs["run"]
        self._trial = trial
        self._former = self._record_file()
        self._last = -1
        # Optuna judges a curve in the direction of the objective.
        self._sign = 1.0 if self._config.minimize == wanted.objectives[0].minimize else -1.0

    def hopeless_at(self) -> int | None:
        """Reports new steps to the study; returns the first step at which the trial should be stopped, or None.

        A finished stage, such as one that is shared with other trials, is reported but not stopped.

        Raises:
            ConfigError: the stage's first line lacks the metric, so nothing would ever be pruned; the error suggests
                one.
        """
        if self._config.pruner is Pruner.none:
            return None
        for step, value in self._new_steps():
            self._last = step
            self._trial.report(self._sign * value, step)
            if self._state() == "running" and self._trial.should_prune():
                return step
        return None

    def _new_steps(self) -> Iterator[tuple[int, float]]:
        rows = self._rows()
        comes_later = self._config.metric in training.HELD_OUT  # with the first look at held-out rows
        if rows and not comes_later and not any(self._config.metric in row for row in rows):
            names = sorted({name for row in rows for name in row} - {"step", "seconds"})
            raise ConfigError(
                f"stage {self._config.stage} does not log {self._config.metric!r} while it trains; "
                f"{suggestion(self._config.metric, names)}",
                where="pruning.metric",
            )
        for row in rows:
            value = row.get(self._config.metric)
            if row["step"] > self._last and isinstance(value, (int, float)) and math.isfinite(value):
                yield row["step"], float(value)

    def _rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, which is in the work folder until the stage is done."""
        artifact = self._entry().artifact
        for folder in [Path(artifact), Path(f"{artifact}.work") / "content"] if artifact else []:
            with suppress(FileNotFoundError):
                return written_rows(folder / METRICS)
        return []

    def _state(self) -> str:
        return self._entry().state

    def _record_file(self) -> tuple[int, int] | None:
        """Which file the record is now: each new record replaces it."""
        try:
            stat = (self._run_folder / FILE).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _entry(self) -> StageEntry:
        """What the trial's run records of the stage; nothing while the record is that of an earlier run of its name."""
        if self._former is not None and self._record_file() == self._former:
            return StageEntry()
        self._former = None
        try:
            return RunRecord.read(self._run_folder).stages.get(self._config.stage, StageEntry())
        except ArtifactError:
            return StageEntry()
