"""Functions of numbers and scores, each against its definition: the best of n, drafts, weights of labels, ensembles,
penalties for length, and importance weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alignment.algos import ppo, preferences
from alignment.algos.ppo import truncated_importance
from alignment.algos.sampling import expected_best, expected_speed_up, kl_bound, label_weights, tokens_per_step
from tests.oracles import best_of_n, distillation, ensembles, importance, length_penalties
from tests.oracles.close import close
from tests.unit.algos.conftest import Batch

POLICY = {"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1}
REWARD = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 3.0}


@pytest.mark.parametrize("scores", [[0.5], [3.0, -1.0, 2.0, 2.0, 0.25, 7.0]])
def test_the_expected_best_is_the_mean_over_all_choices(scores: list[float]) -> None:
    for size in range(1, len(scores) + 1):
        assert expected_best(scores, size) == pytest.approx(best_of_n.mean_of_best(scores, size), abs=1e-12)
    for size in (0, len(scores) + 1):
        with pytest.raises(ValueError, match=f"the best of {size} needs"):
            expected_best(scores, size)


@pytest.mark.parametrize("n", [1, 4, 64])
def test_the_divergence_of_the_best_is_within_the_bound(n: int) -> None:
    best = best_of_n.distribution_of_best(POLICY, REWARD, n)
    assert sum(best.values()) == pytest.approx(1.0)
    assert -1e-12 <= best_of_n.mean(best, best_of_n.log_ratios(best, POLICY)) <= kl_bound(n) + 1e-12


@pytest.mark.parametrize("gamma", [1, 7])
@pytest.mark.parametrize("acceptance", [0.0, 0.31, 0.999])
def test_expected_tokens_and_speed_up_are_those_of_the_paper(acceptance: float, gamma: int) -> None:
    expected = distillation.tokens_per_step(acceptance, gamma)
    assert tokens_per_step(acceptance, gamma) == pytest.approx(expected, rel=1e-12)
    expected = distillation.speed_up(acceptance, gamma, 0.2)
    assert expected_speed_up(acceptance, gamma, 0.2) == pytest.approx(expected, rel=1e-12)
    assert (tokens_per_step(1.0, 4), expected_speed_up(1.0, 4, 0.0), expected_speed_up(0.0, 4, 0.25)) == (5.0, 5.0, 0.5)


@pytest.mark.parametrize(
    ("counts", "given", "expected"),
    [
        ((12, 10), (None, None), (1.0, 1.0)),  # 1.2 is within the bounds
        ((10, 100), (None, None), (10.0, 1.0)),  # the paper's example: λ_D from 10 to 13.3
        ((40, 10), (None, None), (1.0, 3.0)),
        ((10, 10), (2.0, None), (2.0, 1.5)),
        ((10, 10), (0.5, None), (0.5, 0.5)),
        ((10, 10), (None, 2.0), (2.0, 2.0)),
        ((10, 10), (None, 0.25), (1 / 3, 0.25)),
        ((10, 12), (None, 0.8), (1.0, 0.8)),  # 1.04
        ((10, 100), (5.0, 0.5), (5.0, 0.5)),  # as they were set
    ],
)
def test_a_weight_that_is_null_brings_the_ratio_within_its_bounds(
    counts: tuple[int, int], given: tuple[float | None, float | None], expected: tuple[float, float]
) -> None:
    weights = label_weights(*counts, desirable=given[0], undesirable=given[1])
    assert (weights.desirable, weights.undesirable) == pytest.approx(expected)
    assert weights.ratio(*counts) == pytest.approx(expected[0] * counts[0] / (expected[1] * counts[1]))


WAYS = {
    "mean": preferences.mean,
    "min": preferences.worst,
    "mean_minus_std": partial(preferences.mean_minus_std, weight=0.7),
}


@pytest.mark.parametrize("members", [2, 5])
@pytest.mark.parametrize("how", WAYS)
def test_an_ensemble_gives_what_its_paper_says(how: str, members: int) -> None:
    scores = torch.randn(members, 6, generator=torch.Generator().manual_seed(members), dtype=torch.float64) * 3 + 1
    expected = ensembles.combined(scores.tolist(), how, weight=0.7)
    assert WAYS[how](scores).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert WAYS[how](torch.tensor([[2.0, -1.0]] * members)).tolist() == [2.0, -1.0], "members that agree lose nothing"


def test_the_spread_of_an_ensemble_is_the_deviation_of_its_members() -> None:
    assert preferences.spread(torch.tensor([[0.0, 3.0], [4.0, 3.0]], dtype=torch.float64)).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(("longest", "buffer"), [(12, 4), (12, 12), (5, 1)])
def test_an_overlong_answer_loses_what_dapo_says(longest: int, buffer: int) -> None:
    lengths = list(range(1, longest + 4))
    expected = [length_penalties.overlong(length, longest=longest, buffer=buffer) for length in lengths]
    penalty = ppo.of_overlong(torch.tensor(lengths), longest=longest, buffer=buffer)
    assert (-penalty).tolist() == pytest.approx(expected, abs=1e-15)
    assert penalty.dtype == torch.float64
    assert penalty[longest - 1] == 1.0
    assert ppo.of_each_token(torch.tensor([1, 3, 40]), 0.05).tolist() == pytest.approx([0.05, 0.15, 2.0], abs=1e-15)


@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "answers"])
@pytest.mark.parametrize("cap", [1.0, 1.2, 1e6])
def test_importance_weights_are_the_smaller_of_ratio_and_cap(batch: Batch, cap: float, whole: bool) -> None:
    expected = []
    for old, sampled, length in zip(batch.logprobs.tolist(), batch.old_logprobs.tolist(), batch.lengths, strict=True):
        weights = importance.weights(old[:length], sampled[:length], cap=cap, whole=whole)
        expected.append([*weights, *[0.0] * (batch.mask.shape[1] - length)])
    settings = {"cap": cap, "whole_answers": whole}
    close(truncated_importance(batch.logprobs, batch.old_logprobs, batch.mask, **settings), expected)
    on_policy = truncated_importance(batch.logprobs, batch.logprobs, batch.mask, **settings)
    assert torch.equal(on_policy, batch.mask.double())


def test_a_ratio_that_overflows_is_the_cap() -> None:
    far, mask = torch.tensor([[-1000.0]]), torch.ones(1, 1, dtype=torch.bool)
    assert truncated_importance(0.0 * far, far, mask, cap=3.0, whole_answers=False).item() == pytest.approx(3.0)
    assert truncated_importance(far, 0.0 * far, mask, cap=3.0, whole_answers=False).item() == 0.0
