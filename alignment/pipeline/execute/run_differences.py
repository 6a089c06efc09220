"""Differences between runs: each run minus the first one, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.core.artifacts import EVALUATION
from alignment.evaluation import paired_scores
from alignment.records.evaluation import FILE, ArmResult, Evaluation, Metric
from alignment.records.run import RunRecord
from alignment.report.run_page.run_records import Difference, artifact_folder, evaluation_stages
from alignment.stages.registry import produced_by


def evaluations(run_folder: Path) -> dict[str, Path]:
    """The artifacts of a run's finished evaluations, by stage. Raises ArtifactError: there is no such run."""
    stages = RunRecord.read(run_folder).stages
    folders = {
        name: artifact_folder(run_folder, name, stage)
        for name, stage in stages.items()
        if produced_by(stage.kind) == EVALUATION
    }
    return {name: folder for name, folder in folders.items() if folder is not None and (folder / FILE).is_file()}


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
    """An evaluation of several runs: its ``stage``, its arms in each run, none where a run lacks it, and whether it is
    the one that the run's report shows."""

    stage: str
    arms: list[Mapping[str, JudgedArm]]
    shown: list[bool]

    @property
    def name(self) -> str:
        """The stage, or empty if the first run's report shows it, and those of all others that have it."""
        shown = [shown for arms, shown in zip(self.arms, self.shown, strict=True) if arms]
        return "" if self.shown[0] and all(shown) else self.stage

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
    """The evaluations of several runs, each with those of the same name. An evaluation that is shown by the reports of
    all runs that have it is compared with the one that the first run's report shows, if none of these runs has that."""
    own_stages = [_own_stages(run, runs) for run in runs]
    return [
        ComparedEvaluation(
            stage=stage,
            arms=[run.evaluations.get(own.get(stage, ""), {}) for run, own in zip(runs, own_stages, strict=True)],
            shown=[own.get(stage) == run.shown for run, own in zip(runs, own_stages, strict=True)],
        )
        for stage in dict.fromkeys(stage for own in own_stages for stage in own)
    ]


def _own_stages(run: JudgedRun, runs: Sequence[JudgedRun]) -> dict[str, str]:
    own = {stage: stage for stage in run.evaluations}
    first = runs[0].shown
    same = [other for other in runs if run.shown in other.evaluations]
    if first and same and all(other.shown == run.shown and first not in other.evaluations for other in same):
        own = {first: own.pop(run.shown), **own}
    return own


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


def differences_from_first(evaluation: ComparedEvaluation) -> list[Difference]:
    """The differences of each other run minus the first, in every metric of an arm that both have. Those in one metric
    are a family, by whose number p values are corrected. An arm that two runs share has equal scores in both, and is
    not counted."""
    paired = list(_paired(evaluation))
    families: dict[str, list[int]] = {}
    for index, (difference, each) in enumerate(paired):
        if each and any(each):
            families.setdefault(difference.metric.name, []).append(index)
    corrected: dict[int, float] = {}
    for family in families.values():
        p_values = paired_scores.corrected_p_values([paired[index][1] for index in family])
        corrected |= dict(zip(family, p_values, strict=True))
    return [replace(difference, adjusted_p=corrected.get(index)) for index, (difference, _) in enumerate(paired)]


def _paired(evaluation: ComparedEvaluation) -> Iterator[tuple[Difference, list[float]]]:
    """Yields each difference without a p value, and what it is on each prompt; nothing if prompts differ."""
    judged, shown = evaluation.arms, evaluation.shown
    for run, arms in enumerate(judged[1:], start=1):
        for name in [name for name in arms if name in judged[0]]:
            this, first = arms[name], judged[0][name]
            for metric in [metric for metric in this.scores if metric in first.scores]:
                scores, others, unscored = this.scores[metric], first.scores[metric], 0
                if this.prompts == first.prompts:
                    scores, others, unscored = paired_scores.in_both(scores, others)
                each = paired_scores.differences(scores, others) or []
                difference = Difference(
                    run=run,
                    evaluation="" if shown[0] and shown[run] else evaluation.stage,
                    arm=name,
                    metric=this.metrics.get(metric) or Metric(name=metric),
                    interval=paired_scores.difference(scores, others),
                    prompts=len(each),
                    unscored=unscored,
                )
                yield difference, each
