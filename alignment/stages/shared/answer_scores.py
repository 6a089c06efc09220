"""Scores answers outside of training: by a metric of an evaluation, or by the rule of a reward card."""

from __future__ import annotations

from collections.abc import Callable

from alignment.evaluation.endpoint import SavedReplies
from alignment.rewards.functions import FunctionScorer
from alignment.rewards.scorer_sources import function_of
from alignment.rewards.scorers import Answers, Scorer, refuse_unusable
from alignment.rewards.served import Asking
from alignment.training.context import StageContext

AT_ONCE = 128
"""How many answers a scorer gets in one call; a limit, so that a slow scorer still reports progress."""


def counted_progress(context: StageContext, phase: str, total: int | None = None) -> Callable[[int], None]:
    """Reports how much of ``total`` is done, given what was done since the last call."""
    done = 0

    def progress(number: int) -> None:
        nonlocal done
        done += number
        context.progress(phase, done, total)

    return progress


def scores_of(
    scorer: Scorer, answers: Answers, *, source: str, progress: Callable[[int], None] = lambda _: None
) -> list[float]:
    """One score per answer; ``progress`` receives how many answers each call scored, ``source`` names the scorer."""
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


REPLIES = "scorer_replies"
"""A folder in the stage's work folder, which a stage that is started again finds."""


def asking_of(context: StageContext) -> Asking:
    """Saves replies in the work folder of the stage, and reports each as progress. Each process writes a file of its
    own and has read those of all, since their number may have changed."""
    folder = context.spec.work / REPLIES

    def progress() -> None:
        context.heartbeat.reports += 1

    return Asking(
        replies=SavedReplies(folder / f"{context.rank}.jsonl", sorted(folder.glob("*.jsonl"))),
        where=f"stages.{context.spec.stage}",
        progress=progress,
    )
