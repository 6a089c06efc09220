"""PPO's clipped losses, token by token (Schulman et al. 2017, eq. 7; value clipping: Huang et al. 2024, detail 20)."""

from __future__ import annotations

import math

Rows = list[list[float]]
Mask = list[list[bool]]


def policy_loss(logprobs: Rows, old: Rows, advantages: Rows, mask: Mask, *, clip: float) -> float:
    """−Σ min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) over counted tokens."""
    total = 0.0
    for new_row, old_row, advantage_row, keep in zip(logprobs, old, advantages, mask, strict=True):
        for new, before, advantage, counts in zip(new_row, old_row, advantage_row, keep, strict=True):
            if counts:
                ratio = math.exp(min(20.0, max(-20.0, new - before)))
                total -= min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    return total


def value_loss(values: Rows, old: Rows, returns: Rows, mask: Mask, *, clip: float) -> float:
    """Σ ½·max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²) over counted tokens."""
    total = 0.0
    for new_row, old_row, return_row, keep in zip(values, old, returns, mask, strict=True):
        for new, before, target, counts in zip(new_row, old_row, return_row, keep, strict=True):
            if counts:
                near = min(max(new, before - clip), before + clip)
                total += 0.5 * max((new - target) ** 2, (near - target) ** 2)
    return total


def explained_variance(values: Rows, returns: Rows, mask: Mask) -> float:
    """1 − Var(G − V)/Var(G) over counted tokens."""
    pairs = [
        (g, v)
        for value_row, return_row, keep in zip(values, returns, mask, strict=True)
        for v, g, counts in zip(value_row, return_row, keep, strict=True)
        if counts
    ]
    return 1.0 - _variance([g - v for g, v in pairs]) / _variance([g for g, _ in pairs])


def _variance(numbers: list[float]) -> float:
    mean = math.fsum(numbers) / len(numbers)
    return math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)
