"""The best of n answers: its expected score, and a bound on how far it is from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_best(scores: Sequence[float], size: int) -> float:
    """The mean of the highest of ``size`` scores over all choices of ``size`` of these, without replacement.

    Over independent answers it is an unbiased estimate of E[max of ``size`` scores]: the i-th lowest of n scores is
    the highest of a choice with probability C(i − 1, size − 1) / C(n, size).

    Raises:
        ValueError: there are fewer than ``size`` scores, or ``size`` is below 1.
    """
    if not 1 <= size <= len(scores):
        raise ValueError(f"the best of {size} needs at least {size} scores, and there are {len(scores)}")
    choices = math.comb(len(scores), size)
    return sum(math.comb(below, size - 1) / choices * score for below, score in enumerate(sorted(scores)))


def kl_bound(size: int) -> float:
    """log n − (n − 1)/n nats for n = ``size``: an upper bound on KL(best of n ‖ policy) (Beirami et al. 2024).

    It is tight only where no answer is likely and no two have the same score.
    """
    return math.log(size) - (size - 1) / size
