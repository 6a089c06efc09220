"""p values of paired differences, and Holm's correction."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from alignment.evaluation.significance import adjusted_p_values, holm, sign_flip_p_values
from alignment.records.evaluation import LEVEL


def exact_p(differences: list[float]) -> float:
    """By all signs."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)


@pytest.mark.parametrize(
    "differences", [[0.3, 0.1, 0.4, -0.1, 0.5, 0.2, 0.6, 0.1], [1.0, 1.0, 0.0, -1.0, 1.0, 0.0, 1.0], [0.2, -0.2]]
)
def test_a_p_value_is_near_that_of_all_signs(differences: list[float]) -> None:
    (p,) = sign_flip_p_values([differences], seed=0)
    exact = exact_p(differences)
    assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5 + 1e-4)


def test_series_are_tested_one_by_one() -> None:
    rng = np.random.default_rng(1)
    real, null = (rng.normal(0.5, 1.0, 100)).tolist(), rng.normal(0.0, 1.0, 100).tolist()
    p_real, p_null = sign_flip_p_values([real, null], seed=0)
    assert p_real == 1 / 10_000, "no random signs were as far: the least that there is"
    assert p_null > LEVEL


def test_without_any_difference_p_is_one() -> None:
    assert sign_flip_p_values([[0.0] * 20], seed=0) == [1.0]
    assert sign_flip_p_values([], seed=0) == []


def test_the_sign_of_all_differences_does_not_matter() -> None:
    differences = [0.3, -0.1, 0.4, 0.2, 0.7]
    assert sign_flip_p_values([differences], seed=3) == sign_flip_p_values([[-d for d in differences]], seed=3)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.01, 0.005, 0.04, 0.03], [0.03, 0.02, 0.06, 0.06]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_a_family_of_twenty_without_differences_shows_one_in_at_most_one_of_twenty_evaluations() -> None:
    """Metrics of one pair of arms are correlated. Of 200 evaluations at most 5 % and two standard errors are wrong."""
    rng = np.random.default_rng(0)
    with_false_alarm = uncorrected = 0
    for seed in range(200):
        shared = rng.standard_normal((1, 60))
        null = (0.5 * shared + rng.standard_normal((20, 60))) * rng.exponential(1.0, size=(20, 60))
        p_values = sign_flip_p_values(null.tolist(), seed=seed)
        with_false_alarm += min(holm(p_values)) < LEVEL
        uncorrected += min(p_values) < LEVEL
    assert with_false_alarm <= 200 * (LEVEL + 2 * (LEVEL * (1 - LEVEL) / 200) ** 0.5)
    assert uncorrected > 60, "without the correction one evaluation in two or three would be wrong"


def test_one_of_many_comparisons_can_be_real_whatever_the_lengths() -> None:
    """With as many signs as for a few comparisons, no p value would be small enough for a family of 600."""
    series = [[1.0] * 60, *([0.1, -0.1] * (10 + number % 20) for number in range(600))]
    p_values, adjusted = adjusted_p_values(series, seed=0)
    assert adjusted[0] < LEVEL
    assert p_values[0] < adjusted[0]
    assert min(adjusted[1:]) == 1.0
