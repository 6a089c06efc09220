"""Differences between runs: each run minus the first one, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.evaluation import paired_scores
from alignment.pipeline.execute.finished_evaluations import evaluations
from alignment.records.evaluation import ArmResult, Evaluation, Metric
from alignment.records.run import RunRecord
from alignment.report.run_page.run_layout import evaluation_stages
from alignment.report.run_page.run_records import Difference


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedArm:
    """An arm of a run, its evaluation's metrics and prompts, and the scores of its answers by metric and prompt."""

    arm: ArmResult
    metrics: dict[str, Metric]
    primary: Metric | None
    prompts: set[str]
    scores: dict[str, dict[str, float]]


def judged_arms(folder: Path) -> dict[str, dict[str, JudgedArm]]:
    """The arms of each evaluation of a run that has a result, by name.

    The evaluation that the report shows comes first, under an empty name, because it may be named otherwise in another
    run; the others come under the names of their stages.
    """
    finished = evaluations(folder)
    names = [name for name in evaluation_stages(RunRecord.read(folder)) if name in finished]
    return {"" if name == names[0] else name: _arms(finished[name]) for name in names}


def _arms(artifact: Path) -> dict[str, JudgedArm]:
    evaluation = Evaluation.read(artifact)
    metrics = {metric.name: metric for metric in evaluation.metrics}
    prompts = paired_scores.prompts(artifact)
    return {
        arm.name: JudgedArm(
            arm=arm,
            metrics=metrics,
            primary=evaluation.primary_metric,
            prompts=prompts,
            scores=paired_scores.scores(artifact, arm.name),
        )
        for arm in evaluation.arms
    }


def primary_of(judged: Sequence[Mapping[str, JudgedArm]]) -> Metric | None:
    """The metric by which one evaluation of all runs is compared: the primary metric of the first run that has one."""
    return next((arm.primary for arms in judged for arm in arms.values() if arm.primary is not None), None)


def differences_from_first(judged: Sequence[Mapping[str, Mapping[str, JudgedArm]]]) -> Iterator[Difference]:
    """Yields the differences of each other run minus the first, in every metric of an arm that an evaluation of both
    has."""
    for evaluation in dict.fromkeys(name for arms in judged for name in arms):
        yield from _differences(evaluation, [arms.get(evaluation, {}) for arms in judged])


def _differences(evaluation: str, judged: Sequence[Mapping[str, JudgedArm]]) -> Iterator[Difference]:
    for run, arms in enumerate(judged[1:], start=1):
        for name in [name for name in arms if name in judged[0]]:
            this, first = arms[name], judged[0][name]
            for metric in [metric for metric in this.scores if metric in first.scores]:
                scores, others, unscored = this.scores[metric], first.scores[metric], 0
                if this.prompts == first.prompts:
                    scores, others, unscored = paired_scores.in_both(scores, others)
                yield Difference(
                    run=run,
                    evaluation=evaluation,
                    arm=name,
                    metric=this.metrics.get(metric) or Metric(name=metric),
                    interval=paired_scores.difference(scores, others),
                    unscored=unscored,
                )
