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


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRun:
    """The arms of each evaluation of a run that has a result, by stage and name; ``shown`` is the evaluation that the
    run's report shows, or empty without any."""

    shown: str
    evaluations: dict[str, dict[str, JudgedArm]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedEvaluation:
    """An evaluation of several runs: its arms in each run, none where a run lacks it. ``name`` is its stage, or empty
    if it is the evaluation that the report of each run shows."""

    name: str
    arms: list[Mapping[str, JudgedArm]]

    @property
    def primary(self) -> Metric | None:
        """The metric by which runs are compared: the primary metric of the first run that has one."""
        return next((arm.primary for arms in self.arms for arm in arms.values() if arm.primary is not None), None)


def judged_run(folder: Path) -> JudgedRun:
    """The evaluations of a run."""
    finished = evaluations(folder)
    names = [name for name in evaluation_stages(RunRecord.read(folder)) if name in finished]
    return JudgedRun(shown=names[0] if names else "", evaluations={name: _arms(finished[name]) for name in names})


def compared_evaluations(runs: Sequence[JudgedRun]) -> list[ComparedEvaluation]:
    """The evaluations of several runs, each with those of the same name.

    The evaluations that two reports show are compared also under different names, if neither run has the other's.
    """
    first, compared = runs[0], dict[str, list[Mapping[str, JudgedArm]]]()
    own_names = [_names(run, first) for run in runs]
    for name in dict.fromkeys(name for names in own_names for name in names):
        compared[name] = [
            run.evaluations.get(names.get(name, ""), {}) for run, names in zip(runs, own_names, strict=True)
        ]
    shown = all(names.get(first.shown, run.shown) == run.shown for run, names in zip(runs, own_names, strict=True))
    return [
        ComparedEvaluation(name="" if shown and name == first.shown else name, arms=arms)
        for name, arms in compared.items()
    ]


def _names(run: JudgedRun, first: JudgedRun) -> dict[str, str]:
    """A run's evaluations by the names under which they are compared."""
    names = {name: name for name in run.evaluations}
    if run.shown and first.shown and first.shown not in run.evaluations and run.shown not in first.evaluations:
        names = {first.shown: names.pop(run.shown), **names}
    return names


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


def differences_from_first(compared: Sequence[ComparedEvaluation]) -> Iterator[Difference]:
    """Yields the differences of each other run minus the first, in every metric of an arm that an evaluation of both
    has."""
    for evaluation in compared:
        yield from _differences(evaluation.name, evaluation.arms)


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
