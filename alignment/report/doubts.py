"""Reasons in a stage's own metrics not to build on its result, a sentence each. The driver prints them when the stage
ends; ``align status`` and the report show them again."""

from __future__ import annotations

from alignment.config.evaluating import UNTRAINED_ARMS, JudgeKind
from alignment.records.evaluation import BETTER, FEWEST_PROMPTS, ArmResult, Evaluation

SMOKE = "a smoke run: it shows only that the recipe runs; its numbers mean nothing"
_SMOKE_PROFILE = "smoke"


def is_smoke(profile: str) -> bool:
    return profile == _SMOKE_PROFILE


def of_evaluation(evaluation: Evaluation) -> list[str]:
    """Doubts about an evaluation. They are too few prompts, arms whose answers were cut off, a judge without a verdict,
    a winner that repeats itself."""
    doubts = [too_few_prompts(evaluation)] if too_few_prompts(evaluation) else []
    if scores_answers(evaluation):
        doubts += _cut_off(evaluation)
    return doubts + _judge_without_a_verdict(evaluation) + winners_that_repeat_themselves(evaluation)


def scores_answers(evaluation: Evaluation) -> bool:
    """Whether a metric, a judge or the reward model reads the answers. Without a metric, the reader does."""
    judge = evaluation.judge
    return (
        not evaluation.metrics
        or any(metric.of_answers for metric in evaluation.metrics)
        or (judge is not None and judge.kind != JudgeKind.metric.value)
        or any(arm.reward is not None for arm in evaluation.arms)
    )


def compares_answers(evaluation: Evaluation) -> bool:
    """Whether the primary metric, if there is one, reads the answers."""
    return evaluation.primary_metric is None or evaluation.primary_metric.of_answers


def _cut_off(evaluation: Evaluation) -> list[str]:
    doubts = []
    all_cut = [arm.label for arm in evaluation.arms if arm.ended is not None and arm.ended.mean == 0.0]
    most_cut = [
        f"{arm.label} ({1 - arm.ended.mean:.0%})"
        for arm in evaluation.arms
        if arm.ended is not None and 0.0 < arm.ended.mean < 0.5
    ]
    for amount, labels in (("all", all_cut), ("most", most_cut)):
        if labels:
            doubts.append(
                f"{amount} answers of {', '.join(labels)} were cut off at max_new_tokens, so their scores are those of "
                "unfinished text; raise it"
            )
    return doubts


def _judge_without_a_verdict(evaluation: Evaluation) -> list[str]:
    judge = evaluation.judge
    if judge is None or not judge.pairs or any(pair.win_rate is not None for pair in judge.pairs):
        return []
    return [f"by {judge.name}, nothing can be concluded about any pair of arms: {judge.pairs[0].why_nothing}"]


def most_varied(evaluation: Evaluation) -> ArmResult | None:
    """The trained arm with the largest share of distinct answers. An untrained one may be varied for want of a form."""
    trained = [arm for arm in evaluation.arms if arm.name not in UNTRAINED_ARMS and arm.distinct is not None]
    return max(trained, key=lambda arm: arm.distinct or 0.0, default=None)


def repeats_itself(arm: ArmResult, other: ArmResult) -> bool:
    """Whether an arm has less than half of another one's share of distinct answers. The share itself says little: a
    task may have few right answers."""
    return arm.distinct is not None and other.distinct is not None and arm.distinct < other.distinct / 2


def winners_that_repeat_themselves(evaluation: Evaluation) -> list[str]:
    """Arms that are better than another by the primary metric, with less than half of its share of distinct answers. A
    policy that says the same to everybody has often found a gap in what scores it, if that reads its answers."""
    if not compares_answers(evaluation):
        return []
    arms = {arm.name: arm for arm in evaluation.arms}
    beaten: dict[str, list[str]] = {}
    for item in evaluation.comparisons:
        verdict = evaluation.verdict(item)
        names = (item.arm, item.against) if verdict == BETTER else (item.against, item.arm)
        better, worse = arms.get(names[0]), arms.get(names[1])
        if evaluation.is_real(item) and better is not None and worse is not None and repeats_itself(better, worse):
            beaten.setdefault(better.name, []).append(f"{worse.distinct:.0%} of those of {worse.label}")
    return [
        f"only {arms[arm].distinct:.0%} of the answers of {arms[arm].label} are distinct, against "
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
        counted = f"only {number} of {evaluation.num_prompts} prompts have a score by {evaluation.primary} in every arm"
    return f"{counted}, too few for a verdict, which needs at least {FEWEST_PROMPTS}"
