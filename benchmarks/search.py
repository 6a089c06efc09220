"""The rule by which a rival's settings are searched. It times nothing itself: ``measure`` is handed in.

**First pass.** Axes are taken in their order, beginning with the first value of each. On an axis every other value is
tried with the fastest setting so far, and with the leanest so far; each setting is tried once. Joined axes are tried
together, in all combinations of their values. What then is fastest and leanest goes on to the next axis. These trials
are short.

**Second pass.** The setting that the search began with and the ``FINALISTS`` of the first pass are measured as a table
measures, several times in turn. The highest speed and the lowest memory of a setting count. The fastest and the leanest
of these are the two that a table takes.

A setting counts only if it does the same work as the one that the search began with, as that was measured in that pass:
it learns the same, or samples about as many tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.grid import FASTEST, GOALS, LEANEST, Axis, Setting, groups_of, start_of

FINALISTS = {FASTEST: 3, LEANEST: 1}
"""How many of the first pass are measured again. Peak memory varies little from run to run, so one is enough."""
SAME_ANSWERS = 0.25
"""Largest relative difference in the number of sampled tokens. Random numbers alone made up to .12 of 32 answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A setting that was tried: ``speed`` (higher is faster, any unit), ``peak_memory`` in bytes, and the step losses.

    ``answers`` is the number of tokens of sampled answers, in any unit; None where nothing is sampled. With a
    ``failure`` it has no speed. ``final`` trials belong to the second pass.
    """

    setting: Setting
    final: bool
    speed: float = 0.0
    peak_memory: float = 0.0
    losses: tuple[float, ...] = ()
    answers: float | None = None
    failure: str | None = None


Measure = Callable[[Setting, bool], Trial]
"""Called with a setting and whether the trial is final."""


class CannotStart(Exception):
    """The setting that a search begins with failed; the message is its reason."""


def search(axes: Sequence[Axis], measure: Measure, *, tolerance: float, rounds: int) -> dict[str, Setting]:
    """The chosen setting of each goal.

    ``tolerance`` is the largest relative difference of losses from those of the first setting. The second pass has so
    many ``rounds``.

    Raises:
        CannotStart: there is nothing to compare with.
    """
    first = _first_pass(axes, measure, tolerance)
    finals = _second_pass(_finalists(first, tolerance), measure, rounds)
    if finals[0].failure is not None:
        raise CannotStart(finals[0].failure)
    return {goal: best(finals, goal, tolerance).setting for goal in GOALS}


def _first_pass(axes: Sequence[Axis], measure: Measure, tolerance: float) -> list[Trial]:
    start = measure(start_of(axes), False)
    if start.failure is not None:
        raise CannotStart(start.failure)
    trials = [start]
    for group in groups_of(axes):
        leading = [best(trials, goal, tolerance).setting for goal in group[0].goals]
        for setting in [change for base in leading for change in _changes(base, group)]:
            if all(setting != trial.setting for trial in trials):
                trials.append(measure(setting, False))
    return trials


def _changes(setting: Setting, group: Sequence[Axis]) -> list[Setting]:
    names = [axis.name for axis in group]
    combinations = itertools.product(*(axis.values for axis in group))
    changed = [{**setting, **dict(zip(names, values, strict=True))} for values in combinations]
    return [change for change in changed if change != setting]


def _second_pass(settings: Sequence[Setting], measure: Measure, rounds: int) -> list[Trial]:
    """A trial of each setting, which stands for all of its rounds."""
    trials = [[measure(setting, True) for setting in settings] for _ in range(rounds)]
    return [_together(of_setting) for of_setting in zip(*trials, strict=True)]


def _together(trials: Sequence[Trial]) -> Trial:
    """The first trial that did not fail, with the highest speed and the lowest memory of all that did not."""
    able = [trial for trial in trials if trial.failure is None]
    if not able:
        return trials[0]
    speed, memory = max(trial.speed for trial in able), min(trial.peak_memory for trial in able)
    return replace(able[0], speed=speed, peak_memory=memory)


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
    """Best first; among equals the earlier one. Trials that failed or did other work are left out."""
    able = [trial for trial in trials if trial.failure is None and does_the_same(trial, trials[0], tolerance)]
    return sorted(able, key=lambda trial: -trial.speed if goal == FASTEST else trial.peak_memory)


def does_the_same(trial: Trial, start: Trial, tolerance: float) -> bool:
    """Whether the losses of the steps that both took differ by at most ``tolerance``, relative to ``start``, and the
    numbers of sampled tokens by at most ``SAME_ANSWERS``."""
    losses = zip(trial.losses, start.losses, strict=False)
    learned = all(abs(loss - reference) <= tolerance * abs(reference) for loss, reference in losses)
    if trial.answers is None or start.answers is None:
        return learned
    return learned and abs(trial.answers - start.answers) <= SAME_ANSWERS * start.answers
