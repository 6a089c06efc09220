"""A sweep, read from its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.api.loaded_run import Run, load_run
from alignment.core.data_frames import data_frame
from alignment.core.errors import ArtifactError
from alignment.records.sweep_record import SweepRecord, Trial

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Sweep:
    """The trials of a sweep that have ended; ``record`` is the content of sweep.json."""

    folder: Path
    record: SweepRecord

    @property
    def trials(self) -> list[Trial]:
        """All trials: the best first, failed and pruned ones last."""
        return self.record.trials

    @property
    def best(self) -> list[Trial]:
        """The best trial, several if they tie, or the Pareto set if there are several goals; empty until one is
        done."""
        return [trial for trial in self.trials if trial.number in self.record.best]

    def run(self, number: int) -> Run:
        """The run of a trial.

        Raises:
            ArtifactError: there is no such trial, or its run is damaged.
        """
        trial = next((trial for trial in self.trials if trial.number == number), None)
        if trial is None:
            numbers = ", ".join(str(trial.number) for trial in self.trials)
            raise ArtifactError(f"no trial {number}", where=str(self.folder), remedy=f"one of: {numbers}")
        return load_run(self.folder.parents[1] / "runs" / trial.run)

    def frame(self) -> pandas.DataFrame:
        """A row for each trial: ``trial``, ``state``, a column for each setting, and for each goal its mean under the
        goal's label and the ends of its 95 % interval under ``LABEL low`` and ``LABEL high``.

        Raises:
            ConfigError: pandas is not installed.
        """
        keys = [parameter.key for parameter in self.record.parameters]
        labels = [goal.label for goal in self.record.goals]
        figures = [name for label in labels for name in (label, f"{label} low", f"{label} high")]
        return data_frame(["trial", "state", *keys, *figures], (_row(trial, figures) for trial in self.trials))

    def __repr__(self) -> str:
        best = "; ".join(" ".join(trial.words) for trial in self.best)
        return f"Sweep({str(self.folder)!r}, {len(self.trials)} of {self.record.number} trials; best: {best or 'none'})"


def _row(trial: Trial, figures: Sequence[str]) -> dict[str, Any]:
    """A trial by column; without figures if it is not done."""
    values = [number for value in trial.figures for number in (value.mean, value.low, value.high)]
    row = {"trial": trial.number, "state": trial.state, **trial.settings}
    return row | dict(zip(figures, values, strict=False))


def load_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """Reads a sweep, whether or not it has ended; ``folder`` is ``sweeps/RUN.SWEEP`` in the output folder.

    Raises:
        ArtifactError: no trial of a sweep has ended there, or its file is damaged.
    """
    path = Path(folder).expanduser().absolute()
    try:
        return Sweep(folder=path, record=SweepRecord.read(path))
    except FileNotFoundError:
        raise ArtifactError(
            "no trial of a sweep has finished here", where=str(path), remedy="start one: align sweep RECIPE SWEEP"
        ) from None
