"""Scores of prompts of which some have none, because a grader's reply had no grade.

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


def of_prompts(arm: Answered, scores: Sequence[float | None]) -> list[float | None]:
    """The mean over each prompt's turns; ``scores`` have one entry per turn, None for all turns of a prompt or none."""
    means = []
    for of_turns in arm.by_prompt(scores):
        turns = known(of_turns)
        means.append(sum(turns) / len(turns) if len(turns) == len(of_turns) else None)
    return means
