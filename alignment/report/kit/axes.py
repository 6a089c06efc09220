"""Axis ticks at round numbers, and series thinned to the resolution of a small plot."""

from __future__ import annotations

import math
from itertools import pairwise

from alignment.report.kit import text

_ROUNDING = 1e-5
"""Share of a value below which a change is rounding of float32; ticks would differ only in their last digits."""

Points = list[tuple[float, float | None]]
"""(step, value) in order; None is a value that was not finite, drawn as a gap."""


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers inside [low, high], at least one."""
    span = high - low
    if span <= 0:
        return [low]
    step = nice_step(span / max(1, count))
    first = math.ceil(low / step - 1e-9)
    ticks = [index * step for index in range(first, first + 4 * count) if index * step <= high + step * 1e-9]
    return [0.0 if abs(tick) < step * 1e-9 else tick for tick in ticks] or [low]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks in one format, with as few decimals as distinguish them."""
    size = max(abs(tick) for tick in ticks)
    step = min((b - a for a, b in pairwise(ticks)), default=size or 1.0)
    if size >= 1e4 or (size and step < 1e-4):
        labels = [text.compact(tick) for tick in ticks]
        return labels if len(set(labels)) == len(ticks) else apart(ticks)
    decimals = next((d for d in range(6) if abs(round(step, d) - step) < step * 1e-6), 5)
    return [text.number(tick, decimals) for tick in ticks]


def apart(ticks: list[float]) -> list[str]:
    """The ticks with as few significant digits, but at least three, as distinguish them."""
    for digits in range(3, 17):
        labels = [f"{tick:.{digits}g}".replace("-", text.MINUS, int(tick < 0)) for tick in ticks]
        if len(set(labels)) == len(set(ticks)):
            break
    return labels


def padded(values: list[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values with a margin, also around a value that is constant except for rounding."""
    low, high = min(values), max(values)
    if high - low <= _ROUNDING * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    margin = (high - low) * share
    return low - margin, high + margin


def segments(points: Points) -> list[list[tuple[float, float]]]:
    """The parts of a series between its gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return [segment for segment in stretches if segment]


def thinned(points: Points, most: int) -> Points:
    """About ``most`` points at most: the lowest and the highest of each bucket, so that no spike is lost, and a gap."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most / 3))
    thin: Points = []
    for start in range(0, len(points), size):
        bucket = list(enumerate(points[start : start + size]))
        known = [(y, index) for index, (_, y) in bucket if y is not None]
        chosen = {min(known)[1], max(known)[1]} if known else set()
        chosen.update([index for index, (_, y) in bucket if y is None][:1])
        thin += [points[start + index] for index in sorted(chosen)]
    return thin


def smoothed(points: Points) -> Points:
    """The mean of a window around each point, about a fifteenth of the series wide, so that it does not lag. The window
    is cut at the ends of the series; gaps stay gaps."""
    half = max(2, len(points) // 30)
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    result: Points = []
    for index, (x, y) in enumerate(points):
        first, last = max(0, index - half), min(len(points), index + half + 1)
        result.append((x, None if y is None else (sums[last] - sums[first]) / (counts[last] - counts[first])))
    return result
