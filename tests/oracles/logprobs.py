"""Log-softmax, entropy and the likeliest token, one row of logits at a time."""

from __future__ import annotations

import math


def log_softmax(logits: list[float], *, temperature: float = 1.0) -> list[float]:
    """z_i/T − log Σ_j exp(z_j/T)."""
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    norm = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - norm for z in scaled]


def entropy(logits: list[float], *, temperature: float = 1.0) -> float:
    """−Σ p·log p, in nats."""
    return -math.fsum(math.exp(lp) * lp for lp in log_softmax(logits, temperature=temperature))


def is_likeliest(logits: list[float], label: int) -> bool:
    """Whether it is the first of the tokens with the largest logit, which greedy decoding takes."""
    return logits.index(max(logits)) == label
