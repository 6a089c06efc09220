"""Scores of prompts of which some have none, because a grader's reply had no grade or a metric does not apply.

Such a prompt has no score in any arm, so that arms are compared on the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignment.evaluation.arms import Answered

Scores = Mapping[str, Sequence[float | None]]
"""One score per prompt, or per turn of it, keyed by the name of a metric or an arm; None for one without a score."""


def known(scores: Sequence[float | None]) -> list[float]:
    """The scores that there are."""
    return [score for score in scores if score is not None]


def on_the_same_rows(
    by_arm: Mapping[str, Sequence[float | None]], rows: Sequence[int]
) -> dict[str, list[float | None]]:
    """The scores by arm, None for every answer to a row if an answer of any arm to it has none.

    ``rows`` are the rows of the answers, the same for all arms. If no row is left, there are no arms.
    """
    without = {row for scores in by_arm.values() for row, score in zip(rows, scores, strict=True) if score is None}
    if without >= set(rows):
        return {}
    return {
        arm: [None if row in without else score for row, score in zip(rows, scores, strict=True)]
        for arm, scores in by_arm.items()
    }


def of_prompts(arm: Answered, scores: Sequence[float | None]) -> list[float | None]:
    """The mean over each prompt's turns; ``scores`` have one entry per turn, None for all turns of a prompt or none."""
    means = []
    for of_turns in arm.by_prompt(scores):
        turns = known(of_turns)
        means.append(sum(turns) / len(turns) if len(turns) == len(of_turns) else None)
    return means
