"""Intervals by resampling prompts (Efron 1979, percentile method), 95 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over prompts and its 95 % interval."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether a difference of this size would hardly come by chance."""
        return self.low > 0.0 or self.high < 0.0


def mean_interval(values: list[float], *, samples: int, seed: int) -> Interval:
    """The interval of a mean over prompts; of paired differences when ``values`` are such.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(samples, len(data)))
    means = data[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(data.mean()), low=float(low), high=float(high))


def grouped_interval(values: Sequence[float], groups: Sequence[str], *, samples: int, seed: int) -> Interval:
    """The interval of a mean whose values are alike within a group, such as pairs of answers to one prompt: whole
    groups are drawn.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    names, places = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    sums, counts = np.bincount(places, np.asarray(values, dtype=np.float64)), np.bincount(places)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(samples):  # one at a time: all at once would be gigabytes for a large benchmark
        picks = rng.integers(0, len(names), size=len(names))
        means.append(sums[picks].sum() / counts[picks].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(np.mean(values)), low=float(low), high=float(high))
