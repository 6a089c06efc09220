"""Where a trial's settings and figures lie along the axes of a sweep's plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from alignment.records.sweep import Parameter, Setting, Trial
from alignment.report.kit import text
from alignment.report.kit.axes import apart, nice_ticks, padded, tick_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """``place`` maps a value to 0 (its lower end) to 1; ``ticks`` are places with what stands there."""

    title: str
    ticks: list[tuple[float, str]]
    place: Callable[[Setting], float]


def of_parameter(parameter: Parameter) -> Axis:
    """Listed values at even distances in their order; a range by its numbers, or by their size where it is ``log``."""
    title = short(parameter.key)
    if parameter.values:
        last = len(parameter.values) - 1
        places = {value: place / last if last else 0.5 for place, value in enumerate(parameter.values)}
        ticks = [(place, text.name(value, limit=12)) for value, place in places.items()]
        return Axis(title=title, ticks=ticks, place=lambda value: places[str(value)])
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.log:
        return _logarithmic(title, parameter.low, parameter.high)
    return _linear(title, parameter.low, parameter.high)


def of_goal(label: str, trials: list[Trial], index: int) -> Axis:
    """The figures of trials that are done, with a margin."""
    low, high = padded([trial.figures[index].mean for trial in trials])
    return _linear(text.name(label, limit=30), low, high)


def short(key: str) -> str:
    """``stages.dpo.beta`` → ``dpo.beta``."""
    return text.name(key.removeprefix("stages."), limit=30)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; where there are fewer than two, 1, 2 and 5 times such; else the ends."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        found = [factor * power for power in powers for factor in factors]
        inside = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) > 1:
            return inside
    return [low, high]


def _linear(title: str, low: float, high: float) -> Axis:
    def place(value: Setting) -> float:
        return (float(value) - low) / (high - low)

    ticks = nice_ticks(low, high, 5)
    return Axis(
        title=title,
        ticks=[(place(tick), label) for tick, label in zip(ticks, tick_labels(ticks), strict=True)],
        place=place,
    )


def _logarithmic(title: str, low: float, high: float) -> Axis:
    def place(value: Setting) -> float:
        return math.log(float(value) / low) / math.log(high / low)

    ticks = log_ticks(low, high)
    return Axis(
        title=title, ticks=[(place(tick), label) for tick, label in zip(ticks, apart(ticks), strict=True)], place=place
    )
