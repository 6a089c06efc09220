"""Per-token rewards and generalised advantage estimation (Schulman et al. 2016, eq. 16), for answers of any length."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coefficient: float) -> Tensor:
    """``[rows, tokens]``: minus the KL penalty on every counted token, plus the score on the last one.

    Args:
        scores: ``[rows]``, one per whole answer.
        kl: ``[rows, tokens]`` k1 estimates.
        response_mask: True on answer tokens up to and including EOS; answers are left-aligned in a row.
    """
    rewards = -kl_coefficient * kl * response_mask
    last = response_mask.sum(-1) - 1
    return rewards.scatter_add(-1, last[:, None], scores[:, None].to(rewards.dtype))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages (not yet whitened) and returns, both ``[rows, tokens]`` and zero outside the mask.

    ``values[t]`` is the value before token ``t`` is emitted. After the last counted token the value is zero.
    """
    values = values * response_mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        running = (delta + gamma * gae_lambda * running) * response_mask[:, step]
        advantages[:, step] = running
        next_value = values[:, step]
    return advantages, (advantages + values) * response_mask
