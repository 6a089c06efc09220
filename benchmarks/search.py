"""The rule by which a rival's settings are searched. It times nothing itself: ``measure`` is handed in.

**First pass.** Axes are taken in their order, beginning with the first value of each. On an axis every other value is
tried with the fastest setting so far, and with the leanest so far; each setting is tried once. What then is fastest
and leanest goes on to the next axis. These trials are short.

**Second pass.** The setting that the search began with and the ``FINALISTS`` of the first pass are measured as a table
measures. The fastest and the leanest of these are the two that a table takes.

A setting counts only if it learns the same as the one that the search began with, as that was measured in that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.grid import FASTEST, GOALS, LEANEST, Axis, Setting, start_of

FINALISTS = {FASTEST: 2, LEANEST: 1}
"""How many of the first pass are measured again. Peak memory varies little from run to run, so one is enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A setting that was tried: ``speed`` (higher is faster, any unit), ``peak_memory`` in bytes, and the step losses.

    With a ``failure`` it has no speed. ``final`` trials belong to the second pass.
    """

    setting: Setting
    final: bool
    speed: float = 0.0
    peak_memory: float = 0.0
    losses: tuple[float, ...] = ()
    failure: str | None = None


Measure = Callable[[Setting, bool], Trial]
"""Called with a setting and whether the trial is final."""


class CannotStart(Exception):
    """The setting that a search begins with failed; the message is its reason."""


def search(axes: Sequence[Axis], measure: Measure, *, tolerance: float) -> dict[str, Setting]:
    """The chosen setting of each goal.

    ``tolerance`` is the largest relative difference of losses from those of the first setting.

    Raises:
        CannotStart: there is nothing to compare with.
    """
    first = _first_pass(axes, measure, tolerance)
    finals = [measure(setting, True) for setting in _finalists(first, tolerance)]
    if finals[0].failure is not None:
        raise CannotStart(finals[0].failure)
    return {goal: best(finals, goal, tolerance).setting for goal in GOALS}


def _first_pass(axes: Sequence[Axis], measure: Measure, tolerance: float) -> list[Trial]:
    start = measure(start_of(axes), False)
    if start.failure is not None:
        raise CannotStart(start.failure)
    trials = [start]
    for axis in axes:
        leading = [best(trials, goal, tolerance).setting for goal in axis.goals]
        for setting in [change for base in leading for change in _changes(base, axis)]:
            if all(setting != trial.setting for trial in trials):
                trials.append(measure(setting, False))
    return trials


def _changes(setting: Setting, axis: Axis) -> list[Setting]:
    return [{**setting, axis.name: value} for value in axis.values if value != setting[axis.name]]


def _finalists(trials: Sequence[Trial], tolerance: float) -> list[Setting]:
    """The first setting, whose losses are those to compare with, and then the best of each goal."""
    chosen = [trials[0].setting]
    for goal, number in FINALISTS.items():
        for trial in _ranked(trials, goal, tolerance)[:number]:
            if trial.setting not in chosen:
                chosen.append(trial.setting)
    return chosen


def best(trials: Sequence[Trial], goal: str, tolerance: float) -> Trial:
    """The trial that serves a goal best, of those of one pass. The first of them did not fail."""
    return _ranked(trials, goal, tolerance)[0]


def _ranked(trials: Sequence[Trial], goal: str, tolerance: float) -> list[Trial]:
    """Best first; among equals the earlier one. Trials that failed or learned something else are left out."""
    able = [trial for trial in trials if trial.failure is None and learns_the_same(trial, trials[0], tolerance)]
    return sorted(able, key=lambda trial: -trial.speed if goal == FASTEST else trial.peak_memory)


def learns_the_same(trial: Trial, start: Trial, tolerance: float) -> bool:
    """Whether the losses of the steps that both took differ by at most ``tolerance``, relative to ``start``."""
    pairs = zip(trial.losses, start.losses, strict=False)
    return all(abs(loss - reference) <= tolerance * abs(reference) for loss, reference in pairs)
