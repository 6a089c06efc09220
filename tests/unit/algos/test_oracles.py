"""Every function of ``alignment.algos`` equals the slow loop written from its paper, and the known numbers."""

from __future__ import annotations

import pytest
import torch

from alignment.algos.ppo import (
    AdaptiveKl,
    FixedKl,
    advantages_and_returns,
    answer_log_ratio,
    center_and_scale,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    group_centered,
    group_standardized,
    k3,
    leave_one_out,
    log_ratio,
    masked_mean,
    scale_only,
    value_is_clipped,
)
from tests.oracles.close import close
from tests.unit.algos.checks import CHECKS
from tests.unit.algos.conftest import Batch, random_batch


@pytest.mark.parametrize("name", CHECKS)
def test_it_equals_its_oracle(name: str, batch: Batch) -> None:
    CHECKS[name](batch)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", CHECKS)
def test_it_equals_its_oracle_on_random_lengths(name: str, seed: int) -> None:
    CHECKS[name](random_batch([], seed=seed))


def test_keeping_the_mean_while_scaling_gives_the_published_table() -> None:
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    close(scale_only(values, torch.ones_like(values)), expected, rtol=1e-4, atol=5e-5)


def test_twice_the_target_kl_raises_the_coefficient_by_the_published_factor() -> None:
    after = AdaptiveKl(coefficient=1.0, target=6.0, horizon=10_000).after(12.0, 256)
    close(after.coefficient, 1.00512)
    assert (after.target, after.horizon) == (6.0, 10_000)


def test_the_adaptive_coefficient_stands_still_at_the_target_and_falls_below_it() -> None:
    controller = AdaptiveKl(coefficient=0.15, target=6.0, horizon=10_000)
    assert controller.after(6.0, 512).coefficient == 0.15
    assert controller.after(5.9, 512).coefficient < 0.15


def test_the_fixed_coefficient_ignores_the_kl() -> None:
    controller = FixedKl(coefficient=0.05)
    assert controller.after(1e6, 512) is controller


def test_what_stands_outside_the_mask_changes_nothing() -> None:
    batch = random_batch([3, 7, 1, 5], seed=0)
    noise = torch.where(batch.mask, 0.0, 1e6)
    rewards = batch.advantages * batch.mask
    plain = advantages_and_returns(rewards, batch.values, batch.mask, gamma=1.0, gae_lambda=0.95)
    noisy = advantages_and_returns(rewards, batch.values + noise, batch.mask, gamma=1.0, gae_lambda=0.95)
    close(noisy[0], plain[0])
    close(noisy[1], plain[1])
    loss = clipped_value_loss(batch.values, batch.old_values, batch.returns, batch.mask, clip=0.2)
    noisy_loss = clipped_value_loss(batch.values + noise, batch.old_values, batch.returns, batch.mask, clip=0.2)
    close(noisy_loss, loss)


def test_the_mean_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="the mean over no tokens is not defined"):
        masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_equal_values_are_whitened_to_zero_and_stay_finite() -> None:
    values, mask = torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)
    close(center_and_scale(values, mask), torch.zeros(2, 3))
    close(scale_only(values, mask), values)


def test_k3_keeps_its_precision_where_policies_are_nearly_equal() -> None:
    change = torch.tensor([1e-4], dtype=torch.float32)
    close(k3(torch.zeros(1), change), [0.5e-8], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_a_ratio_beyond_the_clip_gets_no_gradient_only_where_it_would_go_further(
    ratio: float, advantage: float, moves: bool
) -> None:
    tensor = torch.tensor([[ratio]], requires_grad=True)
    clipped_policy_loss(tensor, torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), clip=0.2).backward()
    assert tensor.grad.item() == (-advantage if moves else 0.0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_splitting_a_minibatch_never_changes_the_gradient(micro_batch_size: int) -> None:
    batch = random_batch([1, 7, 2, 5, 7, 1, 3, 4], seed=3)
    tokens = batch.mask.sum()

    def gradient(size: int) -> list[torch.Tensor]:
        logprobs, values = batch.logprobs.clone().requires_grad_(), batch.values.clone().requires_grad_()
        for start in range(0, len(batch.lengths), size):
            rows = slice(start, start + size)
            ratio = log_ratio(logprobs[rows], batch.old_logprobs[rows]).exp()
            policy = clipped_policy_loss(ratio, batch.advantages[rows], batch.mask[rows], clip=0.2)
            value = clipped_value_loss(
                values[rows], batch.old_values[rows], batch.returns[rows], batch.mask[rows], clip=0.2
            )
            ((policy + 0.1 * value) / tokens).backward()
        return [logprobs.grad, values.grad]

    for split, whole in zip(gradient(micro_batch_size), gradient(8), strict=True):
        close(split, whole, rtol=1e-12, atol=1e-15)


def test_the_log_ratio_is_clamped_so_that_the_ratio_stays_finite() -> None:
    change = log_ratio(torch.tensor([0.0, -500.0, -3.0]), torch.tensor([-500.0, 0.0, -2.5]))
    assert change.tolist() == [20.0, -20.0, -0.5]
    assert torch.isfinite(change.exp()).all()


def test_an_answers_log_ratio_is_clamped_as_a_whole() -> None:
    new, old = torch.tensor([[-9.0, -9.0, -9.0], [0.5, 0.25, 9.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert answer_log_ratio(new, old, mask).tolist() == [[-20.0], [0.75]]


def test_equal_scores_give_advantages_of_zero() -> None:
    for compare in (leave_one_out, group_standardized, group_centered):
        assert compare(torch.full((4,), 2.5), 4).tolist() == [0.0] * 4


def test_explained_variance_of_constant_returns_is_zero_by_agreement() -> None:
    returns, mask = torch.full((1, 3), 2.0), torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(torch.tensor([[1.0, 2.0, 3.0]]), returns, mask) == 0.0


@pytest.mark.parametrize(
    ("value", "old", "target", "clipped"),
    [
        (0.5, 0.0, 1.0, True),  # moved towards the return by more than the clip
        (-0.5, 0.0, -1.0, True),
        (0.1, 0.0, 1.0, False),
        (-0.5, 0.0, 1.0, False),  # moved away: the unclipped error is the larger one
        (0.2, 0.0, 0.0, False),  # at the bound
        (0.7, 0.4, 0.5, False),  # beyond the return, so its own error is the larger one
    ],
)
def test_a_value_counts_as_clipped_where_it_gets_no_gradient(
    value: float, old: float, target: float, clipped: bool
) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    others = [torch.tensor([[number]], dtype=torch.float64) for number in (old, target)]
    clipped_value_loss(values, *others, torch.ones(1, 1), clip=0.2).backward()
    assert bool(value_is_clipped(values.detach(), *others, clip=0.2)) is clipped
    assert bool((values.grad == 0).all()) is clipped or value == target


def test_a_value_that_moved_within_the_clip_is_never_counted_however_it_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1000, 10, generator=generator)
    values = old + (torch.rand(1000, 10, generator=generator) - 0.5) * 0.39
    returns = torch.randn(1000, 10, generator=generator)
    assert not value_is_clipped(values, old, returns, clip=0.2).any()
    assert not value_is_clipped(old + 9.0, old, returns, clip=None).any()
