"""KTO's loss and its gradient in float64, row by row, from the paper (Ethayarajh et al. 2024, eq. 7 and 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def divergence(policy: Sequence[float], reference: Sequence[float]) -> float:
    """z0 = max(0, mean of log π(y'|x) − log π_ref(y'|x)) over the mismatched answers y'."""
    total = 0.0
    for own, other in zip(policy, reference, strict=True):
        total += own - other
    return max(0.0, total / len(policy))


def loss(
    log_ratios: Sequence[float], desirable: Sequence[bool], z0: float, *, beta: float, weights: tuple[float, float]
) -> float:
    """Mean of λ_y − v(x, y), where v = λ_D σ(β(r − z0)) if the answer is desirable, else λ_U σ(β(z0 − r))."""
    total = 0.0
    for ratio, good in zip(log_ratios, desirable, strict=True):
        if good:
            total += weights[0] - weights[0] * sigmoid(beta * (ratio - z0))
        else:
            total += weights[1] - weights[1] * sigmoid(beta * (z0 - ratio))
    return total / len(log_ratios)


def gradient(
    log_ratios: Sequence[float], desirable: Sequence[bool], z0: float, *, beta: float, weights: tuple[float, float]
) -> list[float]:
    """∂ loss / ∂ log π(y|x) of each row; nothing flows back through z0."""
    slopes = []
    for ratio, good in zip(log_ratios, desirable, strict=True):
        value = sigmoid(beta * (ratio - z0))
        slope = beta * value * (1.0 - value) / len(log_ratios)
        slopes.append(-weights[0] * slope if good else weights[1] * slope)
    return slopes


def rotated(prompts: Sequence[str], batch_size: int) -> list[tuple[int, int]]:
    """Which row's answer stands beside which row's prompt, if all prompts differ: each batch turned on by one row."""
    pairs = []
    for start in range(0, len(prompts), batch_size):
        rows = list(range(start, min(start + batch_size, len(prompts))))
        for number, row in enumerate(rows):
            pairs.append((row, rows[number - 1]))
    return pairs
