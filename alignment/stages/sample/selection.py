"""Which answers to a prompt become rows: functions of texts and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

EMPTY, NO_END, REPEATED = "empty", "no end", "repeated"
"""Why an answer is left out."""
_ROUNDING = 2.0**-22
"""By which a score may miss a limit: four times the rounding of a float32 number. It is relative to the larger of the
two, or to 1, because a small sum may have larger summands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An answer to a prompt, its total score, and whether it has an end."""

    text: str
    score: float
    ended: bool


def left_out(candidates: Sequence[Candidate], *, ended_only: bool) -> dict[int, str]:
    """Why answers to a prompt are left out, by their index; of equal texts the first stays."""
    reasons: dict[int, str] = {}
    seen: set[str] = set()
    for index, candidate in enumerate(candidates):
        if not candidate.text.strip():
            reasons[index] = EMPTY
        elif ended_only and not candidate.ended:
            reasons[index] = NO_END
        elif candidate.text.strip() in seen:
            reasons[index] = REPEATED
        else:
            seen.add(candidate.text.strip())
    return reasons


def is_tied(scores: Mapping[int, float]) -> bool:
    """Whether there are several scores, and all are the same."""
    return len(scores) > 1 and len(set(scores.values())) == 1


def best(scores: Mapping[int, float], threshold: float | None) -> int | None:
    """The index of the highest score, the first of equal ones; None if there is none, or it is below ``threshold``."""
    index = max(scores, key=lambda index: (scores[index], -index), default=None)
    return None if index is None or (threshold is not None and not _reaches(scores[index], threshold)) else index


def pairs(scores: Mapping[int, float], *, every: bool, min_margin: float) -> list[tuple[int, int]]:
    """Indices of a better and a worse answer: of ``every`` two answers, or of the best and the worst.

    Their scores differ, by at least ``min_margin``. Pairs with better answers come first.
    """
    order = sorted(scores, key=lambda index: (-scores[index], index))
    possible = combinations(order, 2) if every else [(order[0], order[-1])] if len(order) > 1 else []
    return [
        (high, low)
        for high, low in possible
        if scores[high] > scores[low] and _reaches(scores[high], scores[low] + min_margin)
    ]


def labels(scores: Mapping[int, float], threshold: float | None) -> dict[int, bool]:
    """Whether each answer is good: its score is at least ``threshold``, or without one above the mean of the scores.

    Without a threshold, a score equal to the mean has no label, and so none if all are the same.
    """
    if threshold is not None:
        return {index: _reaches(score, threshold) for index, score in scores.items()}
    if not scores or is_tied(scores):  # a mean of equal numbers may be rounded to another one
        return {}
    mean = sum(scores.values()) / len(scores)
    return {index: score > mean for index, score in scores.items() if not _is_at(score, mean)}


def _is_at(score: float, mean: float) -> bool:
    """Whether a score, rounded to float32, is the mean: that of 0.2, 0.4 and 0.6 is 0.40000001."""
    return _reaches(score, mean) and _reaches(mean, score)


def _reaches(score: float, limit: float) -> bool:
    """Whether a score, rounded to float32, is at least ``limit``: 0.7 becomes 0.69999999, and reaches 0.7."""
    return score >= limit - _ROUNDING * max(abs(score), abs(limit), 1.0)
