"""Intervals, p values and win rates at equal lengths, against slow computations and the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from alignment.evaluation.bag_of_words import win_rate
from alignment.evaluation.statistics import (
    Intervals,
    adjusted_p_values,
    detectable,
    grouped_interval,
    holm,
    paired_share_interval,
    ratio_interval,
    share_interval,
    sign_flip_p_values,
    unvaried_interval,
)
from alignment.records.evaluation import LEVEL
from alignment.records.interval import Interval
from tests.oracles.close import close

Z = 1.959964
INTERVALS = Intervals(samples=200, seed=0)


def test_the_interval_of_a_normal_mean_is_as_wide_as_the_textbook_says() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    interval = Intervals(samples=4000, seed=0).of(values.tolist())
    error = values.std() / np.sqrt(len(values))
    assert abs((interval.high - interval.low) / (2 * 1.96 * error) - 1.0) < 0.08
    close(interval.mean, values.mean())
    assert Intervals(samples=4000, seed=0).of(values.tolist()) == interval
    assert Intervals(samples=4000, seed=1).of(values.tolist()) != interval
    assert not Intervals(samples=1000, seed=0).of((values - values.mean()).tolist()).excludes_zero()


def test_a_mean_needs_a_value_and_equal_values_have_an_interval_of_no_width() -> None:
    assert Intervals(samples=100, seed=0).of([0.5, 0.5]) == Interval(mean=0.5, low=0.5, high=0.5)
    with pytest.raises(ValueError, match="value"):
        Intervals(samples=100, seed=0).of([])
    with pytest.raises(ValueError, match="value"):
        grouped_interval([], [], least=0.0, most=1.0, samples=5, seed=0)
    with pytest.raises(ValueError, match="value"):
        ratio_interval([], [], samples=10, seed=0)


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)],
)
def test_zero_on_the_edge_is_not_excluded(low: float, high: float, excludes: bool) -> None:
    assert Interval(mean=(low + high) / 2, low=low, high=high).excludes_zero() is excludes


def test_groups_are_drawn_whole_and_values_of_a_ratio_count_by_their_size() -> None:
    values = [1.0, 1.0, 1.0, 0.0]
    interval = grouped_interval(values, ["a", "a", "a", "b"], least=0.0, most=1.0, samples=500, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.75, 0.0, 1.0)
    assert grouped_interval(values, ["a", "b", "c", "d"], least=0.0, most=1.0, samples=500, seed=0).low > 0.0
    assert ratio_interval([10.0, 90.0], [10, 30], samples=100, seed=0) == Interval(mean=2.5, low=1.0, high=3.0)
    values = np.random.default_rng(4).normal(3.0, 1.0, size=50).tolist()
    ratio, mean = ratio_interval(values, [1] * 50, samples=500, seed=7), Intervals(samples=500, seed=7).of(values)
    close([ratio.mean, ratio.low, ratio.high], [mean.mean, mean.low, mean.high])


@pytest.mark.parametrize("values", [[1.0] * 40, [1.0, 0.0] * 20], ids=["all equal", "equal in each group"])
def test_groups_with_the_same_mean_count_as_one_value_each(values: list[float]) -> None:
    groups = [str(index // 2) for index in range(40)]
    interval = grouped_interval(values, groups, least=0.0, most=1.0, samples=50, seed=0)
    assert interval == unvaried_interval(sum(values) / 40, 20, least=0.0, most=1.0)


def test_the_detectable_difference_by_hand() -> None:
    """Differences .1, .3, … of eight prompts: s = √(.08/7), so 2.8 · s / √8; z is 2.638 for a level of .05 / 6."""
    eight = [0.1, 0.3] * 4
    assert detectable(eight) == pytest.approx(2.8016 * math.sqrt(0.08 / 7) / math.sqrt(8), rel=1e-4)
    assert detectable(eight, comparisons=6) == pytest.approx(3.4799 * math.sqrt(0.08 / 7) / math.sqrt(8), rel=1e-4)
    assert detectable([0.1, 0.3, 0.1, 0.3, 0.1]) is None, "2 / 2⁵ is above .05"
    assert detectable([0.1, 0.3] * 3) is not None
    assert detectable([0.1, 0.3] * 3, comparisons=2) is None


@pytest.mark.parametrize(("hits", "count"), [(0, 54), (54, 54), (30, 200)])
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


@pytest.mark.parametrize(("more", "less", "count"), [(0, 0, 54), (4, 0, 200), (2, 12, 40), (30, 20, 50)])
def test_at_both_bounds_a_difference_is_1_96_standard_errors_away(more: int, less: int, count: int) -> None:
    """Tango 1998: the standard error is that under the likeliest rates with the difference at the bound."""
    interval = paired_share_interval(more, less, count)
    assert interval.bounds is not None
    for bound in interval.bounds:
        error = math.sqrt(likeliest_variance(bound, more, less, count))
        assert abs(interval.mean - bound) == pytest.approx(Z * error, rel=2e-3)


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
        (0.5, 0.0, INTERVALS.of_points([0.5] * 20)),
        (0.0, -1.0, paired_share_interval(0, 0, 20)),
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


def exact_p(differences: list[float]) -> float:
    """By all signs."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)


@pytest.mark.parametrize("differences", [[0.3, 0.1, 0.4, -0.1, 0.5, 0.2, 0.6, 0.1], [1.0, 1.0, 0.0, -1.0, 1.0, 0.0]])
def test_a_p_value_is_near_that_of_all_signs(differences: list[float]) -> None:
    (p,) = sign_flip_p_values([differences], seed=0)
    exact = exact_p(differences)
    assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5 + 1e-4)
    assert sign_flip_p_values([[-difference for difference in differences]], seed=0) == [p]


def test_one_of_many_series_can_be_real_and_each_is_tested_alone() -> None:
    rng = np.random.default_rng(1)
    real, null = (rng.normal(0.5, 1.0, 100)).tolist(), rng.normal(0.0, 1.0, 100).tolist()
    p_real, p_null, p_none = sign_flip_p_values([real, null, [0.0] * 100], seed=0)
    assert p_real == 1 / 10_000, "no random signs were as far: the least that there is"
    assert LEVEL < p_null < p_none == 1.0
    assert sign_flip_p_values([], seed=0) == []
    series = [[1.0] * 60, *([0.1, -0.1] * (10 + number % 20) for number in range(600))]
    p_values, adjusted = adjusted_p_values(series, seed=0)
    assert p_values[0] < adjusted[0] < LEVEL
    assert min(adjusted[1:]) == 1.0


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [([0.01, 0.005, 0.04, 0.03], [0.03, 0.02, 0.06, 0.06]), ([0.5, 0.6], [1.0, 1.0]), ([], [])],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def planted(theta: float, phi: float, *, shift: float, count: int = 4000) -> tuple[list[float], list[float]]:
    """Points and extra lengths of an arm whose judge has these coefficients."""
    rng = np.random.default_rng(0)
    extra = rng.normal(shift, 20.0, count)
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(extra / extra.std()))))
    return (rng.random(count) < chance).astype(float).tolist(), extra.tolist()


@pytest.mark.parametrize(
    ("theta", "phi", "shift", "raw"),
    [
        pytest.param(0.0, 2.0, 25.0, (0.7, 1.0), id="equal but longer"),
        pytest.param(0.8, 2.0, -20.0, (0.0, 0.5), id="better but shorter"),
        pytest.param(0.4, 0.0, 10.0, (0.57, 0.63), id="length does not count"),
    ],
)
def test_the_rate_at_equal_lengths_is_that_of_the_judges_preference(
    theta: float, phi: float, shift: float, raw: tuple[float, float]
) -> None:
    points, extra = planted(theta, phi, shift=shift)
    rate = win_rate(points, extra, samples=200, seed=0)
    expected = 1 / (1 + math.exp(-theta))
    assert raw[0] < np.mean(points) < raw[1]
    assert rate.mean == pytest.approx(expected, abs=0.05)
    assert rate.bounds[0] < expected < rate.bounds[1]
    assert (rate.bounds[0] > 0.5) is (theta > 0)


def test_a_win_rate_at_equal_lengths_is_symmetric_finite_and_needs_lengths_on_both_sides() -> None:
    points, extra = planted(0.5, 1.0, shift=5.0, count=300)
    rate = win_rate(points, extra, samples=50, seed=0)
    other = win_rate([1 - point for point in points], [-length for length in extra], samples=50, seed=0)
    even = win_rate([0.5] * 300, extra, samples=50, seed=0)
    assert other.mean == pytest.approx(1 - rate.mean, abs=1e-9)
    assert even.mean == pytest.approx(0.5, abs=1e-6)
    assert win_rate([1.0, 0.0, 1.0], [5.0, 5.0, 5.0], samples=50, seed=0) is None
    assert win_rate([1.0], [5.0], samples=50, seed=0) is None
    points, _ = planted(1.0, 0.0, shift=0.0, count=200)
    longer = np.random.default_rng(0).normal(100, 5, 200)
    longer[:9] = -1.0  # of 200
    assert win_rate(points, longer.tolist(), samples=50, seed=0) is None
    longer[:10] = -1.0
    assert win_rate(points, longer.tolist(), samples=50, seed=0) is not None
    extra = np.random.default_rng(0).normal(1, 1, 200).tolist()
    rate = win_rate([1.0] * 200, extra, samples=50, seed=0)
    assert rate.high is not None
    assert 0.97 < rate.mean <= rate.high <= 1.0
