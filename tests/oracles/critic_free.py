"""RL without a critic, answer by answer and token by token. Advantages and losses of RLOO (Ahmadian et al. 2024,
section 3: an answer is one action), GRPO (Shao et al. 2024, eq. 3 and 4) and Dr. GRPO (Liu et al. 2025, section 3.2),
with the asymmetric clip of DAPO (Yu et al. 2025, eq. 10). Numbers may be floats or scalar tensors, so that autograd can
give gradients."""

from __future__ import annotations

import math
from typing import Any

METHODS = ("rloo", "grpo", "dr_grpo")


def advantages(method: str, rewards: list[float], group: int) -> list[float]:
    """Of each answer; those to one prompt stand together."""
    estimates = []
    for start in range(0, len(rewards), group):
        group_rewards = rewards[start : start + group]
        mean = math.fsum(group_rewards) / group
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group_rewards) / (group - 1))
        for at, reward in enumerate(group_rewards):
            others = [r for number, r in enumerate(group_rewards) if number != at]
            estimates.append(
                {
                    "rloo": reward - math.fsum(others) / len(others),
                    "grpo": (reward - mean) / (deviation + 1e-4),
                    "dr_grpo": reward - mean,
                }[method]
            )
    return estimates


def tied(scores: list[float], group: int) -> list[bool]:
    """Of each prompt: whether its answers all have one score."""
    return [len(set(scores[start : start + group])) == 1 for start in range(0, len(scores), group)]


def surrogate(ratio: Any, advantage: float, *, low: float, high: float) -> Any:
    """min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A)."""
    near = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    return min(ratio * advantage, near * advantage)


def kl(new: Any, reference: Any, exp: Any = math.exp) -> Any:
    """r − log r − 1 with r = ref/π (Schulman 2020), of one token."""
    return exp(reference - new) - (reference - new) - 1


def policy_loss(
    method: str, new: Any, old: Any, given: list[float], *, low: float, high: float, longest: int, exp: Any = math.exp
) -> Any:
    """−J of answers: ``new`` and ``old`` are log-probabilities of their tokens, ``given`` their advantages."""
    total: Any = 0.0
    for now, before, advantage in zip(new, old, given, strict=True):
        if method == "rloo":
            total = total - surrogate(exp(sum(now) - sum(before)), advantage, low=low, high=high)
            continue
        terms = sum(surrogate(exp(n - b), advantage, low=low, high=high) for n, b in zip(now, before, strict=True))
        total = total - terms / (len(now) if method == "grpo" else longest)
    return total / len(given)


def kl_loss(method: str, new: Any, reference: Any, *, longest: int, exp: Any = math.exp) -> Any:
    """The KL of each token, averaged as the method averages its other terms."""
    total: Any = 0.0
    for now, start in zip(new, reference, strict=True):
        terms = sum(kl(n, s, exp) for n, s in zip(now, start, strict=True))
        total = total + terms / {"rloo": 1, "grpo": len(now), "dr_grpo": longest}[method]
    return total / len(new)
