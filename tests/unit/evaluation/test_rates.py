"""Intervals of shares and of their differences are those of the papers, and never collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.rates import paired_share_interval, share_interval, unvaried_interval
from alignment.records.interval import Interval

Z = 1.959964
INTERVALS = Intervals(samples=200, seed=0)


@pytest.mark.parametrize(("hits", "count"), [(0, 54), (54, 54), (1, 10), (30, 200)])
def test_at_both_bounds_a_share_is_1_96_standard_errors_away(hits: int, count: int) -> None:
    """Wilson 1927: |p̂ − p| = z √(p (1 − p) / n), with the standard error at the bound."""
    interval = share_interval(hits, count)
    assert interval.bounds is not None
    for bound, end in zip(interval.bounds, (0.0, 1.0), strict=True):
        if interval.mean != end:
            assert abs(interval.mean - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / count), rel=1e-5)
        else:
            assert bound == end


def likeliest_variance(difference: float, more: int, less: int, count: int) -> float:
    """Of the difference of two shares, under the likeliest rates with this ``difference``: a slow search."""
    rates = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400_001)[1:-1]
    same = np.maximum(1 - difference - 2 * rates, 1e-300)
    loglikelihood = (count - more - less) * np.log(same) if count > more + less else np.zeros_like(rates)
    loglikelihood = loglikelihood + (more * np.log(rates + difference) if more else 0.0)
    loglikelihood = loglikelihood + (less * np.log(rates) if less else 0.0)
    rate = rates[loglikelihood.argmax()]
    return float((2 * rate + difference - difference**2) / count)


@pytest.mark.parametrize(("more", "less", "count"), [(0, 0, 54), (4, 0, 200), (9, 4, 60), (2, 12, 40), (30, 20, 50)])
def test_at_both_bounds_a_difference_is_1_96_standard_errors_away(more: int, less: int, count: int) -> None:
    """Tango 1998: the standard error is that under the likeliest rates with the difference at the bound."""
    interval = paired_share_interval(more, less, count)
    assert interval.bounds is not None
    for bound in interval.bounds:
        error = math.sqrt(likeliest_variance(bound, more, less, count))
        assert abs(interval.mean - bound) == pytest.approx(Z * error, rel=2e-3)


def test_the_interval_of_rare_differences_covers_the_true_one() -> None:
    """1 % of the prompts are better and 3 % worse; resampling 60 prompts covers it less often."""
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(60, [0.01, 0.03, 0.96]) for _ in range(600)]
    intervals = [paired_share_interval(int(more), int(less), 60) for more, less, _ in drawn]
    assert np.mean([interval.low <= -0.02 <= interval.high for interval in intervals]) > 0.93


def test_scores_of_0_and_1_are_shares_and_others_are_resampled() -> None:
    assert INTERVALS.of_scores([1.0, 0.0] * 5) == share_interval(5, 10)
    assert INTERVALS.of_scores([1.0, 0.5] * 5) == INTERVALS.of([1.0, 0.5] * 5)
    first, second = [1.0, 1.0, 0.0, 0.0] * 5, [1.0, 0.0, 1.0, 0.0] * 5
    assert INTERVALS.of_difference(first, second) == paired_share_interval(5, 5, 20)
    assert INTERVALS.of_difference([0.5, 1.0] * 5, [0.25, 0.0] * 5) == INTERVALS.of([0.25, 1.0] * 5)


@pytest.mark.parametrize(
    ("value", "least", "expected"),
    [
        (1.0, 0.0, share_interval(20, 20)),
        (0.0, 0.0, share_interval(0, 20)),
        (0.5, 0.0, INTERVALS.of_points([0.5] * 20)),
        (0.0, -1.0, paired_share_interval(0, 0, 20)),
        (1.0, -1.0, paired_share_interval(20, 0, 20)),
        (-1.0, -1.0, paired_share_interval(0, 20, 20)),
    ],
)
def test_equal_values_have_the_interval_of_shares_and_their_differences(
    value: float, least: float, expected: Interval
) -> None:
    interval = unvaried_interval(value, 20, least=least, most=1.0)
    assert [interval.mean, interval.low, interval.high] == pytest.approx([expected.mean, expected.low, expected.high])


@pytest.mark.parametrize("points", [[1.0] * 20, [0.5] * 20, [1.0, 0.5, 0.5, 0.0] * 5])
def test_a_win_rate_has_the_interval_of_wins_minus_losses(points: list[float]) -> None:
    interval = INTERVALS.of_points(points)
    difference = paired_share_interval(points.count(1.0), points.count(0.0), 20)
    assert interval.mean == pytest.approx(sum(points) / 20)
    assert interval.bounds == pytest.approx([0.5 + bound / 2 for bound in difference.bounds or ()])
