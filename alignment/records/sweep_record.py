"""``sweep.json``, which the page about a sweep shows, and the file in which a trial says how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alignment.core import typed_json
from alignment.core.errors import GateNotMet
from alignment.records.interval import Interval

FILE = "sweep.json"
Setting = str | int | float

FEWEST_FOR_IMPORTANCE = 10
"""Trials of which the better half has five; with fewer, optuna calls its measure of importance unstable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """The objective of trials: ``Goal(label="brevity of stage:dpo", minimize=False)``.

    ``shared_arms`` has the same metric of the other arms that are the same in all trials, such as ``base``, by label.
    ``chance`` is the value that the metric has by chance, if that is known."""

    label: str
    minimize: bool
    shared_arms: dict[str, Interval] = field(default_factory=dict)
    chance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A setting that varies: one of ``values``, or a number from ``low`` to ``high``, on a log scale if ``log``."""

    key: str
    values: list[str]
    low: float | None
    high: float | None
    log: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial that ended: ``done`` with a value for each goal, ``failed`` or ``pruned`` with the reason in words.

    A trial that is done has an ``error`` if its results do not meet a gate. ``words`` are its settings as overrides;
    ``report`` is the path from the sweep's page to the page of the trial's run, or empty."""

    number: int
    run: str
    state: str
    settings: dict[str, Setting]
    words: list[str]
    figures: list[Interval] = field(default_factory=list)
    error: str = ""
    report: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRecord:
    """The results of a sweep so far.

    ``trials`` are in order: the ``best`` first (those that tie, or the Pareto set if there are several goals), failed
    and pruned ones last. ``verdict`` says in words which others may be as good; ``cautions`` are notes on the values,
    and ``no_gain`` names an arm that the sweep does not change and that no trial surpasses. ``importance`` has, for
    each goal, the share of each parameter; it is empty if there are too few trials."""

    name: str
    recipe: str
    overrides: list[str]
    summary: str
    search: str
    number: int
    goals: list[Goal]
    parameters: list[Parameter]
    trials: list[Trial]
    best: list[int]
    verdict: str
    importance: list[dict[str, float]]
    cautions: list[str] = field(default_factory=list)
    no_gain: str = ""
    version: int = 1

    def write(self, folder: Path) -> None:
        """Replaces the file in the sweep's folder."""
        typed_json.write(folder / FILE, self)

    @staticmethod
    def read(folder: Path) -> SweepRecord:
        """The record of the sweep in this folder. Raises FileNotFoundError: no trial of it has ended yet;
        ArtifactError: it is damaged, or was written by a newer version."""
        return typed_json.read(folder / FILE, SweepRecord, remedy="start the sweep again to rewrite it")

    @property
    def is_tied(self) -> bool:
        """Whether several trials have the same best value, so that none of them is the best."""
        return len(self.goals) == 1 and len(self.best) > 1

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "done"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOutcome:
    """How a trial ended: its exit code (alignment/core/errors.py), and in words what went wrong."""

    code: int
    error: str = ""
    version: int = 1

    @property
    def is_done(self) -> bool:
        """Whether all stages are done, also if their results do not meet a gate."""
        return self.code in (0, GateNotMet.exit_code)

    def write(self, file: Path) -> None:
        """Writes the file, which the sweep that started the trial reads."""
        typed_json.write(file, self)

    @staticmethod
    def read(file: Path) -> TrialOutcome:
        """How the trial ended. Raises FileNotFoundError: it wrote nothing; ArtifactError: the file is damaged."""
        return typed_json.read(file, TrialOutcome, remedy="start the sweep again; the trial runs again")
