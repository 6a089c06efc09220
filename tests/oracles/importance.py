"""Truncated importance sampling, answer by answer and token by token (Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"). The gradient of an answer that μ sampled, while π_old is what the learner
computes for the same weights, is min(π_old/μ, C) times that of the clipped term of π/π_old. Numbers may be floats or
scalar tensors, so that autograd can give gradients."""

from __future__ import annotations

import math
from typing import Any

from tests.oracles.critic_free import surrogate


def weights(old: list[float], sampled: list[float], *, cap: float, whole: bool) -> list[float]:
    """Of each token of an answer: min(π_old/μ, C) of the token, or of the ``whole`` answer."""
    if whole:
        ratio = math.exp(math.fsum(old) - math.fsum(sampled))
        return [min(ratio, cap) for _ in old]
    return [min(math.exp(before - drawn), cap) for before, drawn in zip(old, sampled, strict=True)]


def policy_loss(
    method: str,
    new: Any,
    old: list[list[float]],
    sampled: list[list[float]],
    given: list[float],
    *,
    cap: float,
    low: float,
    high: float,
    longest: int,
    exp: Any = math.exp,
) -> Any:
    """−J of answers by PPO, GRPO, Dr. GRPO or RLOO: log-probabilities of their tokens now, before and as they were
    sampled, and the advantage of each answer."""
    total: Any = 0.0
    tokens = sum(map(len, old))
    for now, before, drawn, advantage in zip(new, old, sampled, given, strict=True):
        weight = weights(before, drawn, cap=cap, whole=method == "rloo")
        if method == "rloo":
            ratio = exp(sum(now) - sum(before))
            total = total - weight[0] * surrogate(ratio, advantage, low=low, high=high) / len(given)
            continue
        divisor = {"ppo": tokens, "grpo": len(now) * len(given), "dr_grpo": longest * len(given)}[method]
        for own, earlier, w in zip(now, before, weight, strict=True):
            total = total - w * surrogate(exp(own - earlier), advantage, low=low, high=high) / divisor
    return total
