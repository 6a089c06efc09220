"""What an answer's length costs, case by case as the papers write it."""

from __future__ import annotations


def overlong(length: int, *, longest: int, buffer: int) -> float:
    """R_length of DAPO (Yu et al. 2025, eq. 13), from −1 to 0; L_max is ``longest`` and L_cache is ``buffer``."""
    if length <= longest - buffer:
        return 0.0
    if length <= longest:
        return ((longest - buffer) - length) / buffer
    return -1.0
