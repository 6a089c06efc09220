"""Intervals by resampling prompts (Efron 1979, percentile method), 95 %."""

from __future__ import annotations

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
