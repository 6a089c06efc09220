"""The best of n against its definition, and its bound."""

from __future__ import annotations

import pytest

from alignment.algos.sampling import expected_best, kl_bound
from tests.oracles import best_of_n as oracle

POLICY = {"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1}
REWARD = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 3.0}


@pytest.mark.parametrize("scores", [[0.5], [3.0, -1.0, 2.0, 2.0, 0.25, 7.0]])
def test_the_expected_best_is_the_mean_over_all_choices(scores: list[float]) -> None:
    for size in range(1, len(scores) + 1):
        assert expected_best(scores, size) == pytest.approx(oracle.mean_of_best(scores, size), abs=1e-12)


@pytest.mark.parametrize("size", [0, 4])
def test_the_best_of_more_scores_than_there_are_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"the best of {size} needs"):
        expected_best([1.0, 2.0, 3.0], size)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_divergence_of_the_best_is_within_the_bound(n: int) -> None:
    best = oracle.distribution_of_best(POLICY, REWARD, n)
    assert sum(best.values()) == pytest.approx(1.0)
    divergence = oracle.mean(best, oracle.log_ratios(best, POLICY))
    assert -1e-12 <= divergence <= kl_bound(n) + 1e-12
