"""How much two texts or lists have in common at their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def in_common(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
