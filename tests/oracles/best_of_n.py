"""The best of n independent answers, written from its definition: exact distribution, expectation and divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations


def mean_of_best(scores: Sequence[float], size: int) -> float:
    """The mean of the highest score over every choice of ``size`` of these."""
    choices = list(combinations(scores, size))
    return sum(max(choice) for choice in choices) / len(choices)


def distribution_of_best(policy: Mapping[str, float], reward: Mapping[str, float], n: int) -> dict[str, float]:
    """The probability of each answer to be the best of ``n``, of equally good ones the first. No score above r is drawn
    with probability F(r)ⁿ, and none from r on with F(r−)ⁿ. Answers that score alike share what is between in the
    proportion of their own probabilities."""
    best = {}
    for answer, probability in policy.items():
        up_to = sum(p for other, p in policy.items() if reward[other] <= reward[answer])
        below = sum(p for other, p in policy.items() if reward[other] < reward[answer])
        alike = sum(p for other, p in policy.items() if reward[other] == reward[answer])
        best[answer] = (up_to**n - below**n) * probability / alike
    return best


def mean(distribution: Mapping[str, float], value: Mapping[str, float]) -> float:
    """The expectation of a value."""
    return sum(probability * value[answer] for answer, probability in distribution.items())


def deviation(distribution: Mapping[str, float], value: Mapping[str, float]) -> float:
    """The standard deviation of a value."""
    centre = mean(distribution, value)
    return math.sqrt(sum(p * (value[answer] - centre) ** 2 for answer, p in distribution.items()))


def log_ratios(distribution: Mapping[str, float], policy: Mapping[str, float]) -> dict[str, float]:
    """log q/p of each answer, whose expectation under q is KL(q ‖ p); 0 where q is 0."""
    return {answer: math.log(q / policy[answer]) if q > 0.0 else 0.0 for answer, q in distribution.items()}
