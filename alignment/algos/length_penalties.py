"""Penalties for long answers, to be subtracted from scores."""

from __future__ import annotations

from torch import Tensor


def of_each_token(lengths: Tensor, penalty: float) -> Tensor:
    """``[answers]`` float64: ``penalty`` for each token of answers of ``[answers]`` tokens."""
    return penalty * lengths.double()


def of_overlong(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """``[answers]`` float64 from 0 to 1: what answers of ``[answers]`` tokens lose by coming close to ``longest``.

    0 up to ``longest − buffer`` tokens, then rising linearly to 1 at ``longest``, and 1 beyond. It is the soft overlong
    punishment with the opposite sign (DAPO, Yu et al. 2025, eq. 13).
    """
    return ((lengths.double() - (longest - buffer)) / buffer).clamp(0.0, 1.0)
