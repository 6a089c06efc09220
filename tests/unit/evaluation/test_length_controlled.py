"""Win rates at equal lengths."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.evaluation.length_controlled import win_rate


def planted(
    theta: float, phi: float, *, shift: float, count: int = 4000, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Points and extra lengths of an arm whose judge has these coefficients."""
    rng = np.random.default_rng(seed)
    extra = rng.normal(shift, 20.0, count)
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(extra / extra.std()))))
    return (rng.random(count) < chance).astype(float).tolist(), extra.tolist()


def test_an_equal_but_longer_arm_wins_only_while_length_counts() -> None:
    points, extra = planted(0.0, 2.0, shift=25.0)
    rate = win_rate(points, extra, samples=200, seed=0)
    assert np.mean(points) > 0.7
    assert rate is not None
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low < 0.5 < rate.high
    assert rate.mean == pytest.approx(0.5, abs=0.05)


def test_a_better_arm_of_shorter_answers_wins_at_equal_lengths() -> None:
    points, extra = planted(0.8, 2.0, shift=-20.0)
    rate = win_rate(points, extra, samples=200, seed=0)
    assert np.mean(points) < 0.5
    assert rate is not None
    assert rate.mean == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.04)
    assert rate.low is not None
    assert rate.low > 0.5


def test_where_length_does_not_count_the_rate_is_the_raw_one() -> None:
    points, extra = planted(0.4, 0.0, shift=10.0)
    rate = win_rate(points, extra, samples=100, seed=0)
    assert rate is not None
    assert rate.mean == pytest.approx(np.mean(points), abs=0.03)


def test_the_other_arm_has_the_rest() -> None:
    points, extra = planted(0.5, 1.0, shift=5.0, count=300)
    rate = win_rate(points, extra, samples=50, seed=0)
    other = win_rate([1 - point for point in points], [-length for length in extra], samples=50, seed=0)
    assert rate is not None
    assert other is not None
    assert other.mean == pytest.approx(1 - rate.mean, abs=1e-9)


def test_ties_count_half() -> None:
    extra = np.random.default_rng(0).normal(0, 1, 50).tolist()
    rate = win_rate([0.5] * 50, extra, samples=50, seed=0)
    assert rate is not None
    assert rate.mean == pytest.approx(0.5, abs=1e-6)


def test_nothing_is_said_of_equal_lengths_where_one_arm_is_always_longer() -> None:
    assert win_rate([1.0, 0.0, 1.0], [5.0, 5.0, 5.0], samples=50, seed=0) is None
    assert win_rate([1.0], [5.0], samples=50, seed=0) is None
    points, _ = planted(1.0, 0.0, shift=0.0, count=200)
    longer = np.random.default_rng(0).normal(100, 5, 200)
    assert win_rate(points, longer.tolist(), samples=50, seed=0) is None
    longer[:9] = -1.0  # of 200
    assert win_rate(points, longer.tolist(), samples=50, seed=0) is None
    longer[:10] = -1.0
    assert win_rate(points, longer.tolist(), samples=50, seed=0) is not None


def test_an_arm_that_always_wins_has_a_finite_rate() -> None:
    extra = np.random.default_rng(0).normal(1, 1, 200).tolist()
    rate = win_rate([1.0] * 200, extra, samples=50, seed=0)
    assert rate is not None
    assert 0.97 < rate.mean <= 1.0
    assert rate.high is not None
    assert rate.high <= 1.0
