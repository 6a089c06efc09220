"""Scores answers outside of training: by a metric of an evaluation, or by the rule of a reward card."""

from __future__ import annotations

from collections.abc import Callable

from alignment.rewards.functions import FunctionScorer
from alignment.rewards.scorer_sources import function_of
from alignment.rewards.scorers import Answers, Scorer, refuse_unusable

AT_ONCE = 128
"""How many answers a scorer gets in one call; a limit, so that a slow scorer still reports progress."""


def scores_of(
    scorer: Scorer, answers: Answers, *, source: str, progress: Callable[[int], None] = lambda _: None
) -> list[float]:
    """One score per answer; ``progress`` receives how many answers each call scored, ``source`` names the scorer.

    Raises:
        RewardError: the scorer failed, or did not return one usable number per answer.
    """
    scores: list[float] = []
    for part in answers.parts(AT_ONCE):
        of_part = scorer.scores(part)
        refuse_unusable(of_part, part, source=str(function_of(source) or source))
        scores += of_part.tolist()
        progress(len(part.texts))
    return scores


def metric_scores_of(
    scorer: Scorer, answers: Answers, *, source: str, progress: Callable[[int], None] = lambda _: None
) -> list[float | None]:
    """As ``scores_of``, but a function may give None for an answer, which then has no score."""
    if not isinstance(scorer, FunctionScorer):
        return [*scores_of(scorer, answers, source=source, progress=progress)]
    scores: list[float | None] = []
    for part in answers.parts(AT_ONCE):
        scores += scorer.optional_scores(part)
        progress(len(part.texts))
    return scores
