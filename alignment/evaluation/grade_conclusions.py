"""What metrics that lack scores cannot show, in sentences: arms and prompts without grades, prompts without a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignment.records.evaluation import NOTHING, Grading


def grade_conclusions(gradings: Sequence[Grading], num_prompts: int, labels: Mapping[str, str]) -> list[str]:
    """Sentences about arms that a metric leaves out, and about prompts that do not count; ``labels`` are of arms."""
    sentences = []
    for grading in gradings:
        if grading.left_out:
            arms = ", ".join(f"{labels[arm]} ({grading.invalid[arm]:.0%})" for arm in grading.left_out)
            sentences.append(
                f"By {grading.metric}, {NOTHING} about {arms}: that share of the replies of {grading.model} has no "
                "grade, or no prompt has a grade in every arm."
            )
        counted = grading.num_prompts or 0
        if 0 < counted < num_prompts:
            sentences.append(
                f"{grading.metric} covers {counted} of {num_prompts} prompts; on the others a reply of "
                f"{grading.model} has no grade."
            )
    return sentences


def coverage_conclusions(num_scored: Mapping[str, int], num_prompts: int) -> list[str]:
    """A sentence for each metric that applies only to some of the prompts."""
    return [
        f"{metric} covers {count} of {num_prompts} prompts; on the others it has no value for an answer of an arm."
        if count
        else f"By {metric}, {NOTHING}: on every prompt it has no value for an answer of an arm."
        for metric, count in num_scored.items()
    ]
