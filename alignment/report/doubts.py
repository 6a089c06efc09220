"""What a stage's own figures say against building on its result, in a sentence each.

The driver prints them as the stage ends; ``align status`` and the report show them again.
"""

from __future__ import annotations

from alignment.records.evaluation import Evaluation

SMOKE = "a smoke run: it shows that the recipe runs, and concludes nothing; none of its figures means anything"
_SMOKE_PROFILE = "smoke"


def is_smoke(profile: str) -> bool:
    """Whether a run under this profile was started to see whether it runs."""
    return profile == _SMOKE_PROFILE


def of_evaluation(evaluation: Evaluation) -> list[str]:
    """What the answers of an evaluation say against its arms."""
    cut = [arm.label for arm in evaluation.arms if arm.ended is not None and arm.ended.mean == 0.0]
    if not cut:
        return []
    return [
        f"all answers of {', '.join(cut)} were cut off at max_new_tokens, so their scores are those of unfinished "
        "text; raise it"
    ]
