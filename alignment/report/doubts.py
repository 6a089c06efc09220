"""Reasons in a stage's own metrics not to build on its result, a sentence each.

The driver prints them when the stage ends; ``align status`` and the report show them again.
"""

from __future__ import annotations

from alignment.records.evaluation import Evaluation

SMOKE = "a smoke run: it shows only that the recipe runs; its numbers mean nothing"
_SMOKE_PROFILE = "smoke"


def is_smoke(profile: str) -> bool:
    """Whether the profile only checks that a run works."""
    return profile == _SMOKE_PROFILE


def of_evaluation(evaluation: Evaluation) -> list[str]:
    """Doubts about the arms of an evaluation, from their answers."""
    cut = [arm.label for arm in evaluation.arms if arm.ended is not None and arm.ended.mean == 0.0]
    if not cut:
        return []
    return [
        f"all answers of {', '.join(cut)} were cut off at max_new_tokens, so their scores are those of unfinished "
        "text; raise it"
    ]
