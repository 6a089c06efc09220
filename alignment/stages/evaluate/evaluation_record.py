"""What scored answers and a judge's results say: the content of ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from alignment.evaluation.arms import Scores, known
from alignment.evaluation.conclusions import (
    conclusions,
    contradictions,
    coverage_conclusions,
    grade_conclusions,
    labelled_conclusions,
)
from alignment.evaluation.paired_scores import labels
from alignment.evaluation.statistics import compare
from alignment.evaluation.tables import arm_result, by_task
from alignment.records.evaluation import Evaluation, Grading, JudgedPair
from alignment.rewards.scorer_sources import REWARD
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.judging import Judged, ScoredAnswers


def evaluation_of(
    config: EvaluateConfig,
    scored: ScoredAnswers,
    judged: Judged,
    labelled: JudgedPair | None,
    gradings: Sequence[Grading],
) -> Evaluation:
    """The record with all figures, comparisons and conclusions."""
    primary = scored.primary
    by_primary = {} if primary is None else primary.by_arm
    metric = None if primary is None else primary.metric
    compared = {} if metric is None else {metric.name: _known(by_primary)}
    comparisons = compare(compared, reference=scored.reference, intervals=scored.intervals)
    num_compared = len(next((scores for by_arm in compared.values() for scores in by_arm.values()), scored.rows))
    num_scored = _num_scored(scored, [grading.metric for grading in gradings])
    rewards = {name: scored.arms[name].means(scores) for name, scores in scored.rewards.items() if scores is not None}
    judge_table = judged.table and replace(judged.table, labelled=labelled)
    label_of = labels(config.arms)
    evaluation = Evaluation(
        num_prompts=len(scored.rows),
        metrics=list(scored.metrics),
        primary=None if metric is None else metric.name,
        arms=[
            arm_result(
                name,
                arm,
                label=label_of[name],
                scores=scored.turn_scores[name],
                rewards=scored.rewards[name],
                log_ratios=scored.log_ratios[name],
                win_rate=judged.win_rate(name, reference=scored.reference),
                intervals=scored.intervals,
                sampled=config.answers.temperature > 0.0,
            )
            for name, arm in scored.arms.items()
        ],
        comparisons=comparisons,
        other_comparisons=compare(
            {other.name: _known(scored.by_metric(other.name)) for other in scored.metrics if other != metric},
            reference=scored.reference,
            intervals=scored.intervals,
        ),
        reward_comparisons=compare(
            {REWARD: rewards} if rewards else {}, reference=scored.reference, intervals=scored.intervals
        ),
        tasks=by_task(scored.rows, by_primary),
        judge=judge_table,
        gradings=list(gradings),
        num_scored=num_scored,
        conclusions=[
            *conclusions(num_compared, metric, comparisons, judge_table, label_of),
            *labelled_conclusions(judge_table),
            *grade_conclusions(gradings, len(scored.rows), label_of),
            *coverage_conclusions(num_scored, len(scored.rows)),
        ],
    )
    return replace(evaluation, conclusions=[*evaluation.conclusions, *contradictions(evaluation)])


def _num_scored(scored: ScoredAnswers, graded: Sequence[str]) -> dict[str, int]:
    """How many prompts have a score by each metric that some lack one of, other than the ``graded`` metrics."""
    counts = {
        metric.name: len(known(next(iter(scored.by_metric(metric.name).values()), [])))
        for metric in scored.metrics
        if metric.name not in graded
    }
    return {name: count for name, count in counts.items() if count < len(scored.rows)}


def _known(by_arm: Scores) -> dict[str, list[float]]:
    """The scores that there are, which are on the same prompts for every arm."""
    return {arm: known(values) for arm, values in by_arm.items()}
