"""Positions of a trial's settings and metrics along the axes of a sweep's plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from alignment.records.sweep_record import Parameter, Setting, Trial
from alignment.report.kit import text
from alignment.report.kit.axes import apart, nice_ticks, padded, tick_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """``position`` maps a value to a position from 0 (the lower end) to 1; ``ticks`` are positions with their
    labels."""

    title: str
    ticks: list[tuple[float, str]]
    position: Callable[[Setting], float]


def of_parameter(parameter: Parameter) -> Axis:
    """Listed values at equal distances in their order; a range on a linear scale, or on a logarithmic one if
    ``log``."""
    title = short(parameter.key)
    if parameter.values:
        last = len(parameter.values) - 1
        positions = {value: position / last if last else 0.5 for position, value in enumerate(parameter.values)}
        ticks = [(position, text.name(value, limit=12)) for value, position in positions.items()]
        return Axis(title=title, ticks=ticks, position=lambda value: positions[str(value)])
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.log:
        return _logarithmic(title, parameter.low, parameter.high)
    return _linear(title, parameter.low, parameter.high)


def of_goal(label: str, trials: list[Trial], index: int) -> Axis:
    """The metrics of trials that are done, with a margin."""
    low, high = padded([trial.figures[index].mean for trial in trials])
    return _linear(text.name(label, limit=30), low, high)


def short(key: str) -> str:
    """``stages.dpo.beta`` → ``dpo.beta``."""
    return text.name(key.removeprefix("stages."), limit=30)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; if there are fewer than two, also 2 and 5 times powers; else the ends."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        candidates = [factor * power for power in powers for factor in factors]
        inside = [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) > 1:
            return inside
    return [low, high]


def _linear(title: str, low: float, high: float) -> Axis:
    def position(value: Setting) -> float:
        return (float(value) - low) / (high - low)

    ticks = nice_ticks(low, high, 5)
    return Axis(
        title=title,
        ticks=[(position(tick), label) for tick, label in zip(ticks, tick_labels(ticks), strict=True)],
        position=position,
    )


def _logarithmic(title: str, low: float, high: float) -> Axis:
    def position(value: Setting) -> float:
        return math.log(float(value) / low) / math.log(high / low)

    ticks = log_ticks(low, high)
    return Axis(
        title=title,
        ticks=[(position(tick), label) for tick, label in zip(ticks, apart(ticks), strict=True)],
        position=position,
    )
