"""Paired differences of arms, by every metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.evaluation.bootstrap import Intervals, detectable
from alignment.evaluation.significance import adjusted_p_values
from alignment.records.evaluation import Comparison

ScoresByArm = Mapping[str, Sequence[float]]
"""One score a prompt, by the arm's name."""


def compare(scores: Mapping[str, ScoresByArm], *, reference: str, intervals: Intervals) -> list[Comparison]:
    """The family of all pairs of arms by all of these metrics.

    The scores of a metric are over the same prompts for all arms; other metrics may be over others, as those of several
    benchmarks are. Every two arms are compared: trained ones with the untrained ones, with the ``reference`` and with
    each other.
    """
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
