"""A curve as one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-~=+*#"
"""For terminals whose encoding lacks blocks."""
GAP = " "
_MIDDLE = 3


def sparkline(values: Sequence[float], width: int, *, ramp: str = BLOCKS) -> str:
    """The whole course of ``values`` in at most ``width`` characters, from the lowest to the highest of ``ramp``.

    More values than characters become means of neighbours. A value that is not finite leaves a gap, and a curve that
    does not move lies in the middle.
    """
    means = _means(values, width)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return GAP * len(means)
    low, high = min(finite), max(finite)
    span = high - low
    return "".join(_level(mean, low, span, ramp) for mean in means)


def _level(value: float, low: float, span: float, ramp: str) -> str:
    if not math.isfinite(value):
        return GAP
    if not span:
        return ramp[_MIDDLE]
    return ramp[min(len(ramp) - 1, int((value - low) / span * len(ramp)))]


def _means(values: Sequence[float], width: int) -> list[float]:
    """Means of at most ``width`` stretches of the values, without those that are not finite; NaN for an empty one."""
    if width <= 0:
        return []
    num_stretches = min(width, len(values))
    means = []
    for number in range(num_stretches):
        stretch = values[number * len(values) // num_stretches : (number + 1) * len(values) // num_stretches]
        finite = [value for value in stretch if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means
