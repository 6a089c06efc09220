"""Several answers to one prompt: how often one of k is right, and what the majority says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from alignment.config.scoring import MAJORITY, pass_size
from alignment.evaluation.arms import grouped
from alignment.evaluation.known_scores import known


def scores_of_prompts(
    scores: Sequence[float | None], finals: Sequence[str], *, aggregate: str, passing_score: float, per_prompt: int
) -> list[float | None]:
    """One score per prompt from the scores of its ``per_prompt`` answers (MetricConfig has the aggregates).

    ``finals`` are the final answers that the majority is taken of. A prompt without scores (None) has none.
    """
    size = pass_size(aggregate)
    of_prompts: list[float | None] = []
    for group, answers in zip(grouped(scores, per_prompt), grouped(finals, per_prompt), strict=True):
        given = known(group)
        if len(given) < len(group):
            of_prompts.append(None)
        elif aggregate == MAJORITY:
            of_prompts.append(majority_score(answers, given))
        elif size is not None:
            of_prompts.append(pass_at_k([score >= passing_score for score in given], size))
        else:
            of_prompts.append(sum(given) / len(given))
    return of_prompts


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """The probability that at least one of ``k`` of these answers, drawn without replacement, is correct.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021, section 2.1, with n answers of which c are
    correct.

    Raises:
        ValueError: there are fewer than ``k`` answers.
    """
    if not 1 <= k <= len(correct):
        raise ValueError(f"pass@{k} needs at least {k} answers, and there are {len(correct)}")
    wrong = len(correct) - sum(correct)
    return 1.0 - math.comb(wrong, k) / math.comb(len(correct), k)


def majority_score(answers: Sequence[str], scores: Sequence[float]) -> float:
    """The score of the most frequent final answer (Wang et al. 2023, self-consistency).

    Answers that are equally frequent count with the mean of their scores, as if one of them was drawn. An empty final
    answer does not vote. Without any vote the score is the mean of all.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return sum(scores) / len(scores)
    highest = max(votes.values())
    first = [answers.index(answer) for answer, count in votes.items() if count == highest]
    return sum(scores[index] for index in first) / len(first)
