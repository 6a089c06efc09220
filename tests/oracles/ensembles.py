"""One score of several members, by the definitions of Coste et al. 2024 and Eisenstein et al. 2024, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence


def combined(members: Sequence[Sequence[float]], how: str, *, weight: float = 1.0) -> list[float]:
    """The score of each answer; ``members`` has a row for each member."""
    answers = [[scores[answer] for scores in members] for answer in range(len(members[0]))]
    if how == "min":
        return [sorted(scores)[0] for scores in answers]
    means = [sum(scores) / len(scores) for scores in answers]
    if how == "mean":
        return means
    assert how == "mean_minus_std"
    return [mean - weight * deviation(scores) for mean, scores in zip(means, answers, strict=True)]


def deviation(scores: Sequence[float]) -> float:
    """The root of the mean squared distance from the mean."""
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))


def standardised(scores: Sequence[float], seen: Sequence[float]) -> list[float]:
    """The scores less the mean of all that were seen, divided by their deviation."""
    mean = sum(seen) / len(seen)
    return [(score - mean) / deviation(seen) for score in scores]
