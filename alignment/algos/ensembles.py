"""One score of those of several scorers, to be optimised in place of a single one."""

from __future__ import annotations

from torch import Tensor


def mean(scores: Tensor) -> Tensor:
    """``[answers]``: the mean of ``[members, answers]``."""
    return scores.mean(0)


def worst(scores: Tensor) -> Tensor:
    """``[answers]``: the lowest of ``[members, answers]``, worst-case optimisation (Coste et al. 2024, eq. 3)."""
    return scores.amin(0)


def mean_minus_std(scores: Tensor, weight: float) -> Tensor:
    """``[answers]``: the mean of ``[members, answers]`` less ``weight`` standard deviations of the members.

    With a weight of 1 it is that of Eisenstein et al. 2024 (section 5.1). The deviation is that of the members at hand,
    whose squares are divided by their number. Coste et al. 2024 (eq. 4) subtract the variance instead.
    """
    return mean(scores) - weight * spread(scores)


def spread(scores: Tensor) -> Tensor:
    """``[answers]``: how far ``[members, answers]`` are apart, as their standard deviation."""
    return scores.std(0, unbiased=False)
