"""Every function of ``alignment.algos.ppo`` equals the slow loop written from its paper, and the known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from alignment.algos import ppo
from tests.oracles import critic_free
from tests.oracles import gae as gae_oracle
from tests.oracles import kl as kl_oracle
from tests.oracles import masked as masked_oracle
from tests.oracles import ppo as ppo_oracle
from tests.oracles.close import close
from tests.unit.algos.conftest import Batch, random_batch


def masked_mean(batch: Batch) -> None:
    close(ppo.masked_mean(batch.values, batch.mask), masked_oracle.mean(batch.values.tolist(), batch.mask.tolist()))


def masked_variance(batch: Batch) -> None:
    expected = masked_oracle.variance(batch.values.tolist(), batch.mask.tolist())
    close(ppo.masked_variance(batch.values, batch.mask), expected)


def center_and_scale(batch: Batch) -> None:
    expected = masked_oracle.whitened(batch.values.tolist(), batch.mask.tolist())
    close(ppo.center_and_scale(batch.values, batch.mask), expected)


def scale_only(batch: Batch) -> None:
    expected = masked_oracle.scaled(batch.values.tolist(), batch.mask.tolist())
    close(ppo.scale_only(batch.values, batch.mask), expected)


def k1(batch: Batch) -> None:
    close(ppo.k1(batch.logprobs, batch.reference), _each(kl_oracle.k1, batch))


def k3(batch: Batch) -> None:
    close(ppo.k3(batch.logprobs, batch.reference), _each(kl_oracle.k3, batch))


def adaptive_kl(_: Batch) -> None:
    for seen in (0.0, 5.0, 6.0, 6.5, 7.1, 7.3, 12.0):
        after = ppo.AdaptiveKl(coefficient=0.15, target=6.0, horizon=10_000).after(seen, 256)
        expected = kl_oracle.adapted(0.15, kl=seen, target=6.0, horizon=10_000, num_episodes=256)
        close(after.coefficient, expected)


def token_rewards(batch: Batch) -> None:
    costs = batch.logprobs - batch.reference
    expected = gae_oracle.token_rewards(batch.scores.tolist(), costs.tolist(), batch.lengths, kl_coefficient=0.05)
    close(ppo.token_rewards(batch.scores, costs, batch.mask, kl_coefficient=0.05), expected)


def advantages_and_returns(batch: Batch) -> None:
    rewards = batch.advantages * batch.mask
    for gamma, gae_lambda in ((1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)):
        advantages, returns = ppo.advantages_and_returns(
            rewards, batch.values, batch.mask, gamma=gamma, gae_lambda=gae_lambda
        )
        arguments = (rewards.tolist(), batch.values.tolist(), batch.lengths)
        close(advantages, gae_oracle.advantages(*arguments, gamma=gamma, gae_lambda=gae_lambda))
        close(returns, gae_oracle.returns(*arguments, gamma=gamma, gae_lambda=gae_lambda))


def clipped_policy_loss(batch: Batch) -> None:
    change = ppo.log_ratio(batch.logprobs, batch.old_logprobs)
    loss = ppo.clipped_policy_loss(change.exp(), batch.advantages, batch.mask, clip=0.2)
    arguments = (batch.logprobs, batch.old_logprobs, batch.advantages, batch.mask)
    close(loss, ppo_oracle.policy_loss(*(t.tolist() for t in arguments), clip=0.2))


def asymmetric_policy_loss(batch: Batch) -> None:
    ratio = ppo.log_ratio(batch.logprobs, batch.old_logprobs).exp()
    loss = ppo.clipped_policy_loss(ratio, batch.advantages, batch.mask, clip=0.2, clip_high=0.35)
    expected = -math.fsum(
        critic_free.surrogate(math.exp(new - old), advantage, low=0.2, high=0.35)
        for rows in zip(*_counted(batch, batch.logprobs, batch.old_logprobs, batch.advantages), strict=True)
        for new, old, advantage in zip(*rows, strict=True)
    )
    close(loss, expected)


def answer_log_ratio(batch: Batch) -> None:
    new, old = _counted(batch, batch.logprobs, batch.old_logprobs)
    expected = [[math.fsum(now) - math.fsum(before)] for now, before in zip(new, old, strict=True)]
    close(ppo.answer_log_ratio(batch.logprobs, batch.old_logprobs, batch.mask), expected)


def leave_one_out(batch: Batch) -> None:
    _compared("rloo", ppo.leave_one_out, batch)


def group_standardized(batch: Batch) -> None:
    _compared("grpo", ppo.group_standardized, batch)


def group_centered(batch: Batch) -> None:
    _compared("dr_grpo", ppo.group_centered, batch)


def tied_groups(batch: Batch) -> None:
    scores = torch.tensor([1.5, 1.5, 2.0, -0.5, 0.0, 0.0])
    assert ppo.tied_groups(scores, 2).tolist() == critic_free.tied(scores.tolist(), 2) == [True, False, True]
    assert ppo.tied_groups(scores, 3).tolist() == [False, False]


def _compared(method: str, compare: Callable[[torch.Tensor, int], torch.Tensor], batch: Batch) -> None:
    for size in (2, len(batch.scores)):
        close(compare(batch.scores, size), critic_free.advantages(method, batch.scores.tolist(), size))


def _counted(batch: Batch, *figures: torch.Tensor) -> list[list[list[float]]]:
    return [[row[:length] for row, length in zip(each.tolist(), batch.lengths, strict=True)] for each in figures]


def clipped_value_loss(batch: Batch) -> None:
    arguments = (batch.values, batch.old_values, batch.returns, batch.mask)
    expected = ppo_oracle.value_loss(*(t.tolist() for t in arguments), clip=0.2)
    close(ppo.clipped_value_loss(*arguments, clip=0.2), expected)


def unclipped_value_loss(batch: Batch) -> None:
    arguments = (batch.values, batch.old_values, batch.returns, batch.mask)
    expected = ppo_oracle.value_loss(*(t.tolist() for t in arguments), clip=math.inf)
    close(ppo.clipped_value_loss(*arguments, clip=None), expected)


def explained_variance(batch: Batch) -> None:
    arguments = (batch.values, batch.returns, batch.mask)
    close(ppo.explained_variance(*arguments), ppo_oracle.explained_variance(*(t.tolist() for t in arguments)))


def whole_update(batch: Batch) -> None:
    costs = ppo.k1(batch.old_logprobs, batch.reference) * batch.mask
    rewards = ppo.token_rewards(batch.scores, costs, batch.mask, kl_coefficient=0.05)
    raw, returns = ppo.advantages_and_returns(rewards, batch.old_values, batch.mask, gamma=1.0, gae_lambda=0.95)
    advantages = ppo.center_and_scale(raw, batch.mask)
    ratio = ppo.log_ratio(batch.logprobs, batch.old_logprobs).exp()
    policy = ppo.clipped_policy_loss(ratio, advantages, batch.mask, clip=0.2)
    value = ppo.clipped_value_loss(batch.values, batch.old_values, returns, batch.mask, clip=0.2)
    expected_policy, expected_value = _expected_update(batch)
    close(policy, expected_policy)
    close(value, expected_value)


def _expected_update(batch: Batch) -> tuple[float, float]:
    mask = batch.mask.tolist()
    costs = [
        [kl_oracle.k1(*pair) for pair in zip(*rows, strict=True)]
        for rows in zip(batch.old_logprobs.tolist(), batch.reference.tolist(), strict=True)
    ]
    rewards = gae_oracle.token_rewards(batch.scores.tolist(), costs, batch.lengths, kl_coefficient=0.05)
    arguments = (rewards, batch.old_values.tolist(), batch.lengths)
    raw = gae_oracle.advantages(*arguments, gamma=1.0, gae_lambda=0.95)
    returns = gae_oracle.returns(*arguments, gamma=1.0, gae_lambda=0.95)
    advantages = masked_oracle.whitened(raw, mask)
    policy = ppo_oracle.policy_loss(batch.logprobs.tolist(), batch.old_logprobs.tolist(), advantages, mask, clip=0.2)
    value = ppo_oracle.value_loss(batch.values.tolist(), batch.old_values.tolist(), returns, mask, clip=0.2)
    return policy, value


def _each(oracle: Callable[[float, float], float], batch: Batch) -> list[list[float]]:
    pairs = torch.stack([batch.logprobs, batch.reference], dim=-1).tolist()
    expected = [[oracle(*pair) for pair in row] for row in pairs]
    assert all(math.isfinite(number) for row in expected for number in row)
    return expected


CHECKS: tuple[Callable[[Batch], None], ...] = (
    *(masked_mean, masked_variance, center_and_scale, scale_only),
    *(k1, k3, adaptive_kl, token_rewards),
    *(advantages_and_returns, clipped_policy_loss, asymmetric_policy_loss, answer_log_ratio),
    *(leave_one_out, group_standardized, group_centered, tied_groups),
    *(clipped_value_loss, unclipped_value_loss, explained_variance, whole_update),
)


@pytest.mark.parametrize("check", CHECKS)
def test_it_equals_its_oracle(check: Callable[[Batch], None], batch: Batch) -> None:
    check(batch)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("check", CHECKS)
def test_it_equals_its_oracle_on_random_lengths(check: Callable[[Batch], None], seed: int) -> None:
    check(random_batch([], seed=seed))


def test_keeping_the_mean_while_scaling_gives_the_published_table() -> None:
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    close(ppo.scale_only(values, torch.ones_like(values)), expected, rtol=1e-4, atol=5e-5)


def test_twice_the_target_kl_raises_the_coefficient_by_the_published_factor() -> None:
    after = ppo.AdaptiveKl(coefficient=1.0, target=6.0, horizon=10_000).after(12.0, 256)
    close(after.coefficient, 1.00512)
    assert (after.target, after.horizon) == (6.0, 10_000)


def test_the_adaptive_coefficient_stands_still_at_the_target_and_falls_below_it() -> None:
    controller = ppo.AdaptiveKl(coefficient=0.15, target=6.0, horizon=10_000)
    assert controller.after(6.0, 512).coefficient == 0.15
    assert controller.after(5.9, 512).coefficient < 0.15


def test_the_fixed_coefficient_ignores_the_kl() -> None:
    controller = ppo.FixedKl(coefficient=0.05)
    assert controller.after(1e6, 512) is controller


def test_what_stands_outside_the_mask_changes_nothing() -> None:
    batch = random_batch([3, 7, 1, 5], seed=0)
    noise = torch.where(batch.mask, 0.0, 1e6)
    rewards = batch.advantages * batch.mask
    plain = ppo.advantages_and_returns(rewards, batch.values, batch.mask, gamma=1.0, gae_lambda=0.95)
    noisy = ppo.advantages_and_returns(rewards, batch.values + noise, batch.mask, gamma=1.0, gae_lambda=0.95)
    close(noisy[0], plain[0])
    close(noisy[1], plain[1])
    loss = ppo.clipped_value_loss(batch.values, batch.old_values, batch.returns, batch.mask, clip=0.2)
    noisy_loss = ppo.clipped_value_loss(batch.values + noise, batch.old_values, batch.returns, batch.mask, clip=0.2)
    close(noisy_loss, loss)


def test_the_mean_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="the mean over no tokens is not defined"):
        ppo.masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_equal_values_are_whitened_to_zero_and_stay_finite() -> None:
    values, mask = torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)
    close(ppo.center_and_scale(values, mask), torch.zeros(2, 3))
    close(ppo.scale_only(values, mask), values)


def test_k3_keeps_its_precision_where_policies_are_nearly_equal() -> None:
    change = torch.tensor([1e-4], dtype=torch.float32)
    close(ppo.k3(torch.zeros(1), change), [0.5e-8], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_a_ratio_beyond_the_clip_gets_no_gradient_only_where_it_would_go_further(
    ratio: float, advantage: float, moves: bool
) -> None:
    tensor = torch.tensor([[ratio]], requires_grad=True)
    ppo.clipped_policy_loss(
        tensor, torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), clip=0.2
    ).backward()
    assert tensor.grad.item() == (-advantage if moves else 0.0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_splitting_a_minibatch_never_changes_the_gradient(micro_batch_size: int) -> None:
    batch = random_batch([1, 7, 2, 5, 7, 1, 3, 4], seed=3)
    tokens = batch.mask.sum()

    def gradient(size: int) -> list[torch.Tensor]:
        logprobs, values = batch.logprobs.clone().requires_grad_(), batch.values.clone().requires_grad_()
        for start in range(0, len(batch.lengths), size):
            rows = slice(start, start + size)
            ratio = ppo.log_ratio(logprobs[rows], batch.old_logprobs[rows]).exp()
            policy = ppo.clipped_policy_loss(ratio, batch.advantages[rows], batch.mask[rows], clip=0.2)
            value = ppo.clipped_value_loss(
                values[rows], batch.old_values[rows], batch.returns[rows], batch.mask[rows], clip=0.2
            )
            ((policy + 0.1 * value) / tokens).backward()
        return [logprobs.grad, values.grad]

    for split, whole in zip(gradient(micro_batch_size), gradient(8), strict=True):
        close(split, whole, rtol=1e-12, atol=1e-15)


def test_the_log_ratio_is_clamped_so_that_the_ratio_stays_finite() -> None:
    change = ppo.log_ratio(torch.tensor([0.0, -500.0, -3.0]), torch.tensor([-500.0, 0.0, -2.5]))
    assert change.tolist() == [20.0, -20.0, -0.5]
    assert torch.isfinite(change.exp()).all()


def test_an_answers_log_ratio_is_clamped_as_a_whole() -> None:
    new, old = torch.tensor([[-9.0, -9.0, -9.0], [0.5, 0.25, 9.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert ppo.answer_log_ratio(new, old, mask).tolist() == [[-20.0], [0.75]]


def test_equal_scores_give_advantages_of_zero() -> None:
    for compare in (ppo.leave_one_out, ppo.group_standardized, ppo.group_centered):
        assert compare(torch.full((4,), 2.5), 4).tolist() == [0.0] * 4


def test_explained_variance_of_constant_returns_is_zero_by_agreement() -> None:
    returns, mask = torch.full((1, 3), 2.0), torch.ones(1, 3, dtype=torch.bool)
    assert ppo.explained_variance(torch.tensor([[1.0, 2.0, 3.0]]), returns, mask) == 0.0


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
    ppo.clipped_value_loss(values, *others, torch.ones(1, 1), clip=0.2).backward()
    assert bool(ppo.value_is_clipped(values.detach(), *others, clip=0.2)) is clipped
    assert bool((values.grad == 0).all()) is clipped or value == target


def test_a_value_that_moved_within_the_clip_is_never_counted_however_it_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1000, 10, generator=generator)
    values = old + (torch.rand(1000, 10, generator=generator) - 0.5) * 0.39
    returns = torch.randn(1000, 10, generator=generator)
    assert not ppo.value_is_clipped(values, old, returns, clip=0.2).any()
    assert not ppo.value_is_clipped(old + 9.0, old, returns, clip=None).any()
