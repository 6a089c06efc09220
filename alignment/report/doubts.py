"""Reasons in a stage's own metrics not to build on its result, a sentence each.

The driver prints them when the stage ends; ``align status`` and the report show them again.
"""

from __future__ import annotations

from alignment.records.evaluation import BETTER, FEWEST_PROMPTS, ArmResult, Evaluation

SMOKE = "a smoke run: it shows only that the recipe runs; its numbers mean nothing"
_SMOKE_PROFILE = "smoke"


def is_smoke(profile: str) -> bool:
    """Whether the profile only checks that a run works."""
    return profile == _SMOKE_PROFILE


def of_evaluation(evaluation: Evaluation) -> list[str]:
    """Doubts about an evaluation.

    They are too few prompts, arms whose answers were cut off, a judge without a verdict, a winner that repeats itself.
    """
    doubts = [too_few_prompts(evaluation)] if too_few_prompts(evaluation) else []
    all_cut = [arm.label for arm in evaluation.arms if arm.ended is not None and arm.ended.mean == 0.0]
    most_cut = [f"{arm.label} ({1 - arm.ended.mean:.0%})" for arm in evaluation.arms if arm.ended and _mostly_cut(arm)]
    for amount, labels in (("all", all_cut), ("most", most_cut)):
        if labels:
            doubts.append(
                f"{amount} answers of {', '.join(labels)} were cut off at max_new_tokens, so their scores are those of "
                "unfinished text; raise it"
            )
    return doubts + _judge_without_a_verdict(evaluation) + winners_that_repeat_themselves(evaluation)


def _judge_without_a_verdict(evaluation: Evaluation) -> list[str]:
    """A judge that was asked, and of which nothing can be concluded for any pair of arms."""
    judge = evaluation.judge
    if judge is None or not judge.pairs or any(pair.win_rate is not None for pair in judge.pairs):
        return []
    return [f"by {judge.name}, nothing can be concluded about any pair of arms: {judge.pairs[0].why_nothing}"]


def winners_that_repeat_themselves(evaluation: Evaluation) -> list[str]:
    """Arms that are better than another by the primary metric, with less than half of its share of distinct answers.

    A policy that says the same to everybody has often found a gap in what scores it.
    """
    shares = {arm.name: arm.distinct for arm in evaluation.arms}
    beaten: dict[str, list[str]] = {}
    for item in evaluation.comparisons:
        verdict = evaluation.verdict(item)
        better, worse = (item.arm, item.against) if verdict == BETTER else (item.against, item.arm)
        share, other = shares.get(better), shares.get(worse)
        if item.real and share is not None and other is not None and share < other / 2:
            beaten.setdefault(better, []).append(f"{other:.0%} of those of {evaluation.label(worse)}")
    return [
        f"only {shares[arm]:.0%} of the answers of {evaluation.label(arm)} are distinct, against "
        f"{' and '.join(others)}: read some before you trust its score"
        for arm, others in beaten.items()
    ]


def too_few_prompts(evaluation: Evaluation) -> str:
    """Why no arm can be called better on so few prompts; empty if there are enough."""
    number = evaluation.num_compared
    if number is None or number >= FEWEST_PROMPTS:
        return ""
    counted = f"only {number} prompts were evaluated"
    if number != evaluation.num_prompts:
        counted = f"only {number} of {evaluation.num_prompts} prompts have a grade by {evaluation.primary} in every arm"
    return f"{counted}, too few for a verdict, which needs at least {FEWEST_PROMPTS}"


def _mostly_cut(arm: ArmResult) -> bool:
    return arm.ended is not None and 0.0 < arm.ended.mean < 0.5
