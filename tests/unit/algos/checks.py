"""Each function of ``alignment.algos`` against its oracle, as a check. The functions are looked up in their modules at
call time, so that a test can put a faulty one in their place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from alignment.algos import ppo
from tests.oracles import critic_free
from tests.oracles import gae as gae_oracle
from tests.oracles import kl as kl_oracle
from tests.oracles import masked as masked_oracle
from tests.oracles import ppo as ppo_oracle
from tests.oracles.close import close
from tests.unit.algos.conftest import Batch


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


CHECKS: dict[str, Callable[[Batch], None]] = {
    check.__name__: check
    for check in (
        masked_mean,
        masked_variance,
        center_and_scale,
        scale_only,
        k1,
        k3,
        adaptive_kl,
        token_rewards,
        advantages_and_returns,
        clipped_policy_loss,
        asymmetric_policy_loss,
        answer_log_ratio,
        leave_one_out,
        group_standardized,
        group_centered,
        tied_groups,
        clipped_value_loss,
        unclipped_value_loss,
        explained_variance,
        whole_update,
    )
}
