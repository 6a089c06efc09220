"""Intervals cover what they should as often as they should."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.evaluation.bootstrap import grouped_interval, mean_interval, ratio_interval
from alignment.evaluation.rates import unvaried_interval
from alignment.records.interval import Interval
from tests.oracles.close import close


def test_ninety_five_percent_intervals_cover_the_mean_about_as_often() -> None:
    """400 samples of 60 exponential draws with mean 1; the percentile method is known to fall a little short here."""
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.exponential(size=60).tolist(), samples=500, seed=seed) for seed in range(400)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.90 < covered < 0.97


def test_the_interval_of_a_normal_mean_is_as_wide_as_the_textbook_says() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    interval = mean_interval(values.tolist(), samples=4000, seed=0)
    error = values.std() / np.sqrt(len(values))
    assert abs((interval.high - interval.low) / (2 * 1.96 * error) - 1.0) < 0.08
    close(interval.mean, values.mean())


def test_a_paired_difference_is_found_where_unpaired_intervals_overlap() -> None:
    rng = np.random.default_rng(2)
    prompts = rng.uniform(0.0, 1.0, size=100)
    before, after = prompts, prompts + 0.03 + rng.normal(0.0, 0.02, size=100)
    apart = [mean_interval(values.tolist(), samples=1000, seed=0) for values in (before, after)]
    assert apart[0].high > apart[1].low
    paired = mean_interval((after - before).tolist(), samples=1000, seed=0)
    assert paired.excludes_zero()
    assert 0.02 < paired.low < 0.03 < paired.high < 0.04


def test_no_difference_is_not_called_one() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, size=200)
    assert not mean_interval((values - values.mean()).tolist(), samples=1000, seed=0).excludes_zero()


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.5, 0.9, 0.2]
    assert mean_interval(values, samples=200, seed=4) == mean_interval(values, samples=200, seed=4)
    assert mean_interval(values, samples=200, seed=4) != mean_interval(values, samples=200, seed=5)


def test_equal_values_and_a_single_value_have_an_interval_of_no_width() -> None:
    for values in ([0.5, 0.5, 0.5], [0.5]):
        assert mean_interval(values, samples=100, seed=0) == Interval(mean=0.5, low=0.5, high=0.5)


def test_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([], samples=100, seed=0)


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)],
)
def test_zero_on_the_edge_is_not_excluded(low: float, high: float, excludes: bool) -> None:
    assert Interval(mean=(low + high) / 2, low=low, high=high).excludes_zero() is excludes


def test_groups_are_drawn_whole() -> None:
    values = [1.0, 1.0, 1.0, 0.0]
    interval = grouped_interval(values, ["a", "a", "a", "b"], least=0.0, most=1.0, samples=500, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.75, 0.0, 1.0)
    by_itself = grouped_interval(values, ["a", "b", "c", "d"], least=0.0, most=1.0, samples=500, seed=0)
    assert by_itself.low > 0.0
    with pytest.raises(ValueError, match="at least one value"):
        grouped_interval([], [], least=0.0, most=1.0, samples=5, seed=0)


@pytest.mark.parametrize("values", [[1.0] * 40, [1.0, 0.0] * 20], ids=["all equal", "equal in each group"])
def test_groups_with_the_same_mean_count_as_one_value_each(values: list[float]) -> None:
    groups = [str(index // 2) for index in range(40)]
    interval = grouped_interval(values, groups, least=0.0, most=1.0, samples=50, seed=0)
    assert interval == unvaried_interval(sum(values) / 40, 20, least=0.0, most=1.0)


def test_a_ratio_of_equal_sizes_is_a_mean() -> None:
    values = np.random.default_rng(4).normal(3.0, 1.0, size=50).tolist()
    ratio, mean = ratio_interval(values, [1] * 50, samples=500, seed=7), mean_interval(values, samples=500, seed=7)
    close([ratio.mean, ratio.low, ratio.high], [mean.mean, mean.low, mean.high])


def test_in_a_ratio_a_value_counts_by_its_size() -> None:
    assert ratio_interval([10.0, 90.0], [10, 30], samples=100, seed=0) == Interval(mean=2.5, low=1.0, high=3.0)


def test_a_ratio_needs_a_value() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        ratio_interval([], [], samples=10, seed=0)
