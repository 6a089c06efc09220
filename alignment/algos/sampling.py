"""Numbers without tensors: the best of n answers, the gain of speculative decoding, and weights of KTO's labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def expected_best(scores: Sequence[float], size: int) -> float:
    """The mean of the highest of ``size`` scores over all choices of ``size`` of these, without replacement. Over
    independent answers it is an unbiased estimate of E[max of ``size`` scores]: the i-th lowest of n scores is the
    highest of a choice with probability C(i − 1, size − 1) / C(n, size). Raises ValueError: there are fewer than
    ``size`` scores, or ``size`` is below 1."""
    if not 1 <= size <= len(scores):
        raise ValueError(f"the best of {size} needs at least {size} scores, and there are {len(scores)}")
    choices = math.comb(len(scores), size)
    return sum(math.comb(below, size - 1) / choices * score for below, score in enumerate(sorted(scores)))


def kl_bound(size: int) -> float:
    """log n − (n − 1)/n nats for n = ``size``: an upper bound on KL(best of n ‖ policy) (Beirami et al. 2024). It is
    tight only where no answer is likely and no two have the same score."""
    return math.log(size) - (size - 1) / size


def tokens_per_step(acceptance: float, gamma: int) -> float:
    """The expected number of tokens that one pass of the target yields, (1 − α^(γ+1)) / (1 − α) (equation 1).
    ``acceptance`` is α, the mean probability that a drafted token is accepted; ``gamma`` tokens are drafted at a
    time."""
    return float(sum(acceptance**power for power in range(gamma + 1)))


def expected_speed_up(acceptance: float, gamma: int, cost_ratio: float) -> float:
    """How many times faster than the target alone, (1 − α^(γ+1)) / ((1 − α)(γc + 1)) (theorem 3.8). ``cost_ratio`` is
    c, the time of a pass of the draft divided by that of the target. Verifying γ + 1 tokens is assumed to take as long
    as one pass of the target."""
    return tokens_per_step(acceptance, gamma) / (gamma * cost_ratio + 1.0)


LEAST_RATIO, GREATEST_RATIO = 1.0, 4 / 3
"""Bounds on λ_D n_D / (λ_U n_U), which the paper recommends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelWeights:
    """λ_D and λ_U."""

    desirable: float
    undesirable: float

    def ratio(self, num_desirable: int, num_undesirable: int) -> float:
        """λ_D n_D / (λ_U n_U)."""
        return self.desirable * num_desirable / (self.undesirable * num_undesirable)


def label_weights(
    num_desirable: int, num_undesirable: int, *, desirable: float | None, undesirable: float | None
) -> LabelWeights:
    """The weights, where one that is None is the nearest to 1 that brings the ratio within its bounds. If both are
    None, only one of them is changed, and raised. Example: 10 desirable and 30 undesirable answers give λ_D = 3 and λ_U
    = 1, and 40 and 10 give λ_D = 1 and λ_U = 3. Both numbers must be positive."""
    at_one = LabelWeights(desirable=desirable or 1.0, undesirable=undesirable or 1.0)
    ratio = at_one.ratio(num_desirable, num_undesirable)
    excess = ratio / min(max(ratio, LEAST_RATIO), GREATEST_RATIO)
    if desirable is None and (undesirable is not None or excess < 1.0):
        return LabelWeights(desirable=at_one.desirable / excess, undesirable=at_one.undesirable)
    if undesirable is None:
        return LabelWeights(desirable=at_one.desirable, undesirable=at_one.undesirable * excess)
    return at_one
