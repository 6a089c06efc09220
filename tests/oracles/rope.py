"""Rotary positions (Su et al. 2021, section 3.4.2) in float64 and plain loops, for both ways of pairing elements."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rotated(head: Sequence[float], position: int, *, theta: float, interleaved: bool) -> list[float]:
    """One head's vector at a position. Pair i is turned by position · theta^(−2i/d). ``interleaved``: its elements are
    2i and 2i + 1, as in the paper and in llama.cpp's ``llama``; otherwise i and i + d/2, as in transformers."""
    width = len(head)
    turned = list(head)
    for pair in range(width // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        angle = position * theta ** (-2 * pair / width)
        turned[first] = head[first] * math.cos(angle) - head[second] * math.sin(angle)
        turned[second] = head[first] * math.sin(angle) + head[second] * math.cos(angle)
    return turned


def attention_score(query: Sequence[float], key: Sequence[float], *, distance: int, interleaved: bool) -> float:
    """The product of a query at ``distance`` and a key at position 0, theta 10,000."""
    left = rotated(query, distance, theta=1e4, interleaved=interleaved)
    right = rotated(key, 0, theta=1e4, interleaved=interleaved)
    return sum(a * b for a, b in zip(left, right, strict=True))
