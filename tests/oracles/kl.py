"""KL estimators (Schulman 2020) and the adaptive price of KL (Ziegler et al. 2019, section 2.2), number by number."""

from __future__ import annotations

import math


def k1(logprob: float, reference: float) -> float:
    """−log r with r = ref/π."""
    return -math.log(math.exp(reference) / math.exp(logprob))


def k3(logprob: float, reference: float) -> float:
    """(r − 1) − log r with r = ref/π."""
    ratio = math.exp(reference) / math.exp(logprob)
    return (ratio - 1.0) - math.log(ratio)


def adapted(coefficient: float, *, kl: float, target: float, horizon: int, num_episodes: int) -> float:
    """β ← β·(1 + e·n/horizon) with e = clip(KL/target − 1, −0.2, 0.2)."""
    error = kl / target - 1.0
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return coefficient * (1.0 + error * num_episodes / horizon)
