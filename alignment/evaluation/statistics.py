"""Intervals and tests: rates, the bootstrap, p-values, and comparisons of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.records.evaluation import LEVEL, Comparison
from alignment.records.interval import Interval

_Z = NormalDist().inv_cdf(1 - LEVEL / 2)
_HALVINGS = 60


def are_shares(*series: Sequence[float]) -> bool:
    """Whether every value says whether a prompt has a property: it is 0 or 1."""
    return all(value in (0.0, 1.0) for values in series for value in values)


def share_interval(hits: int, count: int) -> Interval:
    """The share of ``hits`` with the rates p at which it is at most 1.96 standard errors from p (Wilson 1927). Example:
    0 of 54 gives 0 to z² / (54 + z²) = 0.066."""
    share, spread = hits / count, _Z**2 / count
    middle = share + spread / 2
    reach = _Z * math.sqrt(share * (1 - share) / count + spread / count / 4)
    low, high = ((middle + side) / (1 + spread) for side in (-reach, reach))
    # Rounding must not leave the share outside of its interval where it is 0 or 1.
    return Interval(mean=share, low=min(max(low, 0.0), share), high=max(min(high, 1.0), share))


def paired_share_interval(more: int, less: int, count: int) -> Interval:
    """The difference of two shares over the same prompts with its score interval (Tango 1998, eq. 6 to 8). ``more``
    prompts have only the first of the two properties, ``less`` only the second, of ``count`` prompts. The interval has
    the differences that are at most 1.96 standard errors from the observed one. The standard error is that under the
    likeliest rates with this difference, so it is not zero where no prompt differs."""
    difference = (more - less) / count

    def is_beyond(candidate: float, side: float) -> bool:
        error = math.sqrt(count * max(0.0, _variance(candidate, more, less, count)))
        return side * count * (difference - candidate) > _Z * error

    return Interval(
        mean=difference,
        low=_farthest(partial(is_beyond, side=1.0), difference, -1.0),
        high=_farthest(partial(is_beyond, side=-1.0), difference, 1.0),
    )


def unvaried_interval(value: float, count: int, *, least: float, most: float) -> Interval:
    """The mean of ``count`` values between ``least`` and ``most`` that all equal ``value``. Other values may have a
    share of up to z² / (n + z²) (Wilson 1927) and lie at the end of the range. Of shares, and of differences of two
    shares, these are the intervals of the functions above. Example: 20 values of 1 between 0 and 1 give 0.839 to 1."""
    share = _Z**2 / (count + _Z**2)
    return Interval(mean=value, low=value - share * (value - least), high=value + share * (most - value))


def _variance(difference: float, more: int, less: int, count: int) -> float:
    """Of one prompt's difference, under the likeliest share of prompts of the kind ``less`` given this difference."""
    slope = -more - less + (2 * count - more + less) * difference
    root = math.sqrt(max(0.0, slope**2 + 8 * count * less * difference * (1 - difference)))
    return 2 * (root - slope) / (4 * count) + difference * (1 - difference)


def _farthest(is_outside: Callable[[float], bool], inside: float, end: float) -> float:
    """The last value between ``inside`` and ``end`` that is not outside of the interval."""
    if not is_outside(end):
        return end
    outside = end
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_outside(middle) else (middle, outside)
    return inside


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """Settings of the bootstrap: every figure uses the same resamples of prompts. Shares do without (statistics.py)."""

    samples: int
    seed: int

    def of(self, values: list[float]) -> Interval:
        """The mean over prompts with its 95 % interval."""
        return ratio_interval(values, [1] * len(values), samples=self.samples, seed=self.seed)

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


def grouped_interval(
    values: Sequence[float], groups: Sequence[str], *, least: float, most: float, samples: int, seed: int
) -> Interval:
    """The interval of a mean whose values depend on each other within a group, such as pairs of answers to one prompt:
    whole groups are drawn. Values lie between ``least`` and ``most``, which counts if all groups have the same mean.
    Raises ValueError: no values."""
    if not values:
        raise ValueError("an interval needs at least one value")
    _, group_of = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    sums, counts = np.bincount(group_of, np.asarray(values, dtype=np.float64)), np.bincount(group_of)
    means = sums / counts
    if (means == means[0]).all():
        return unvaried_interval(float(means[0]), len(means), least=least, most=most)
    return ratio_interval(sums.tolist(), counts.tolist(), samples=samples, seed=seed)


def ratio_interval(values: Sequence[float], sizes: Sequence[float], *, samples: int, seed: int) -> Interval:
    """The interval of Σ values / Σ sizes, such as nats per token over texts. Raises ValueError: no values."""
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
    """The true mean difference that four of five evaluations of this size would show among so many ``comparisons``. (z
    + .84) · s / √n, with the standard deviation s of the paired differences: the size at which a test has a power of 80
    % (Cohen 1988, chapter 2, in the normal approximation). z is the quantile for a level of 5 % shared by the
    comparisons, 1.96 for a single one: what Holm's correction asks of the first. None where no difference could be
    shown: the smallest p value of a randomisation test on n prompts is 2 / 2ⁿ."""
    count = len(differences)
    if count < 2 or 2.0 ** (1 - count) * comparisons >= LEVEL:
        return None
    quantiles = NormalDist().inv_cdf(1 - LEVEL / 2 / comparisons) + NormalDist().inv_cdf(0.8)
    return quantiles * float(np.std(differences, ddof=1)) / math.sqrt(count)


_SAMPLES, _SAMPLES_OF_EACH = 9_999, 200
"""At least so many random signs are drawn in all, and for each comparison of a family: .05 / m is ten times the least
p value."""
_AT_ONCE = 500
_CLOSE = 1e-9


def adjusted_p_values(series: Sequence[Sequence[float]], *, seed: int) -> tuple[list[float], list[float]]:
    """The p value of each series of paired differences, and those adjusted for their number (``holm``). Series of one
    length are over the same prompts."""
    p_values = p_values_of(series, seed=seed, comparisons=len(series))
    return p_values, holm(p_values)


def p_values_of(series: Sequence[Sequence[float]], *, seed: int, comparisons: int) -> list[float]:
    """The p value of each series of paired differences, from enough random signs for so many ``comparisons``."""
    p_values = [1.0] * len(series)
    for length in dict.fromkeys(map(len, series)):
        same = [index for index, differences in enumerate(series) if len(differences) == length]
        tested = sign_flip_p_values([series[index] for index in same], seed=seed, comparisons=comparisons)
        for index, p in zip(same, tested, strict=True):
            p_values[index] = p
    return p_values


def sign_flip_p_values(series: Sequence[Sequence[float]], *, seed: int, comparisons: int | None = None) -> list[float]:
    """The two-sided p value of each series of paired differences over the same prompts. They are to be corrected for so
    many ``comparisons``, by default those of ``series``: random signs are drawn in proportion, because the least p
    value is the inverse of their number. If two arms were alike, each prompt's difference could as well have the other
    sign (Fisher 1935, chapter 3). The p value is the share of random signs under which the mean is at least as far from
    zero, the observed signs counted as one of them (Phipson and Smyth 2010). So it is never zero, and it is 1 where all
    differences are zero."""
    if not series:
        return []
    differences = np.asarray(series, dtype=np.float64).T
    observed = np.abs(differences.sum(axis=0))
    bound = observed - _CLOSE * np.abs(differences).sum(axis=0)  # sums in another order differ in their last digits
    samples = max(_SAMPLES, _SAMPLES_OF_EACH * (comparisons or len(series)))
    rng = np.random.default_rng(seed)
    as_far = np.ones(len(series))
    for start in range(0, samples, _AT_ONCE):
        count = min(_AT_ONCE, samples - start)
        signs = rng.integers(0, 2, size=(count, len(differences)), dtype=np.int8) * 2.0 - 1.0
        as_far += (np.abs(signs @ differences) >= bound).sum(axis=0)
    return (as_far / (samples + 1)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979). Of comparisons without any true difference, one falls below a
    level with at most the probability of that level. The k-th smallest of m is multiplied by m - k + 1. Example:
    ``[0.01, 0.04, 0.03]`` becomes ``[0.03, 0.06, 0.06]``."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


ScoresByArm = Mapping[str, Sequence[float]]
"""One score a prompt, by the arm's name."""


def compare(scores: Mapping[str, ScoresByArm], *, reference: str, intervals: Intervals) -> list[Comparison]:
    """The family of all pairs of arms by all of these metrics. The scores of a metric are over the same prompts for all
    arms; other metrics may be over others, as those of several benchmarks are. Every two arms are compared: trained
    ones with the untrained ones, with the ``reference`` and with each other."""
    compared = [
        (metric, arm, against)
        for metric, by_arm in scores.items()
        for arm, against in _pairs(by_arm, reference=reference)
    ]
    series = [_differences(scores[metric], arm, against) for metric, arm, against in compared]
    comparisons = []
    for (metric, arm, against), differences, p, adjusted in zip(
        compared, series, *adjusted_p_values(series, seed=intervals.seed), strict=True
    ):
        interval = intervals.of_difference(scores[metric][arm], scores[metric][against])
        low, high = interval.bounds or (interval.mean, interval.mean)
        comparisons.append(
            Comparison(
                arm=arm,
                against=against,
                metric=metric,
                difference=interval.mean,
                low=low,
                high=high,
                p=p,
                adjusted_p=adjusted,
                detectable=detectable(differences, comparisons=len(compared)),
            )
        )
    return comparisons


def _pairs(arms: Iterable[str], *, reference: str) -> list[tuple[str, str]]:
    """Every two arms, as (later, earlier): untrained ones, then the reference, then the other trained ones."""
    names = list(arms)
    ordered = [name for name in dict.fromkeys([*UNTRAINED_ARMS, reference, *names]) if name in names]
    return [(later, earlier) for number, later in enumerate(ordered) for earlier in ordered[:number]]


def _differences(by_arm: ScoresByArm, arm: str, against: str) -> list[float]:
    return [score - other for score, other in zip(by_arm[arm], by_arm[against], strict=True)]
