"""95 % intervals by resampling prompts (Efron 1979, percentile method), and the smallest detectable difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from alignment.evaluation.rates import are_shares, paired_share_interval, share_interval, unvaried_interval
from alignment.records.evaluation import LEVEL
from alignment.records.interval import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """Settings of the bootstrap: every figure uses the same resamples of prompts. Shares do without (rates.py)."""

    samples: int
    seed: int

    def of(self, values: list[float]) -> Interval:
        """The mean over prompts with its 95 % interval."""
        return mean_interval(values, samples=self.samples, seed=self.seed)

    def of_scores(self, scores: list[float]) -> Interval:
        """The mean of a score; if every score is 0 or 1, the interval is that of a share."""
        return share_interval(scores.count(1.0), len(scores)) if scores and are_shares(scores) else self.of(scores)

    def of_difference(self, scores: Sequence[float], others: Sequence[float]) -> Interval:
        """The mean of ``scores`` minus ``others``, paired; if every score is 0 or 1, that of two shares."""
        differences = [score - other for score, other in zip(scores, others, strict=True)]
        if not differences or not are_shares(scores, others):
            return self.of(differences)
        return paired_share_interval(differences.count(1.0), differences.count(-1.0), len(differences))

    def of_points(self, points: list[float]) -> Interval:
        """The win rate of points 1, 0 and 0.5 for a tie: one half and half of the share of wins minus that of losses.
        Other points are resampled."""
        if not points or set(points) - {0.0, 0.5, 1.0}:
            return self.of(points)
        difference = paired_share_interval(points.count(1.0), points.count(0.0), len(points))
        return difference.through(lambda difference: 0.5 + difference / 2)

    def of_ratio(self, values: Sequence[float], sizes: Sequence[float]) -> Interval:
        """Σ values / Σ sizes with its 95 % interval."""
        return ratio_interval(values, sizes, samples=self.samples, seed=self.seed)


def mean_interval(values: Sequence[float], *, samples: int, seed: int) -> Interval:
    """The interval of a mean over prompts; ``values`` may be paired differences.

    Raises:
        ValueError: no values.
    """
    return ratio_interval(values, [1] * len(values), samples=samples, seed=seed)


def grouped_interval(
    values: Sequence[float], groups: Sequence[str], *, least: float, most: float, samples: int, seed: int
) -> Interval:
    """The interval of a mean whose values depend on each other within a group, such as pairs of answers to one prompt:
    whole groups are drawn. Values lie between ``least`` and ``most``, which counts if all groups have the same mean.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    _, group_of = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    sums, counts = np.bincount(group_of, np.asarray(values, dtype=np.float64)), np.bincount(group_of)
    means = sums / counts
    if (means == means[0]).all():
        return unvaried_interval(float(means[0]), len(means), least=least, most=most)
    return ratio_interval(sums.tolist(), counts.tolist(), samples=samples, seed=seed)


def ratio_interval(values: Sequence[float], sizes: Sequence[float], *, samples: int, seed: int) -> Interval:
    """The interval of Σ values / Σ sizes, such as nats per token over texts.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    data, weights = np.asarray(values, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):  # one sample at a time: all at once would take gigabytes for a large benchmark
        picks = rng.integers(0, len(data), size=len(data))
        drawn.append(data[picks].sum() / weights[picks].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean=float(data.sum() / weights.sum()), low=float(low), high=float(high))


def detectable(differences: Sequence[float], *, comparisons: int = 1) -> float | None:
    """The true mean difference that four of five evaluations of this size would show among so many ``comparisons``.

    (z + .84) · s / √n, with the standard deviation s of the paired differences: the size at which a test has a power of
    80 % (Cohen 1988, chapter 2, in the normal approximation). z is the quantile for a level of 5 % shared by the
    comparisons, 1.96 for a single one: what Holm's correction asks of the first. None where no difference could be
    shown: the smallest p value of a randomisation test on n prompts is 2 / 2ⁿ.
    """
    count = len(differences)
    if count < 2 or 2.0 ** (1 - count) * comparisons >= LEVEL:
        return None
    quantiles = NormalDist().inv_cdf(1 - LEVEL / 2 / comparisons) + NormalDist().inv_cdf(0.8)
    return quantiles * float(np.std(differences, ddof=1)) / math.sqrt(count)
