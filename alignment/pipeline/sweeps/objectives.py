"""Objectives of a sweep: resolved in the recipe before anything starts, and read from each finished run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.evaluating import FEW_SHOT, PROMPTED, JudgeKind
from alignment.config.faults import Fault, suggestion
from alignment.config.stage import StageConfig
from alignment.config.sweep import LESS_IS_BETTER, PRIMARY, ArmMetric, ObjectiveConfig
from alignment.core.artifacts import EVALUATION, read_manifest
from alignment.core.errors import ConfigError, NonFiniteError, StageError
from alignment.evaluation import paired_scores
from alignment.evaluation.paired_scores import primary_name, recorded
from alignment.evaluation.verdicts import pairs_of
from alignment.pipeline.plan.plan import Plan
from alignment.records import training
from alignment.records.evaluation import Evaluation
from alignment.records.interval import Interval
from alignment.records.run import RunRecord
from alignment.stages.base import Reported
from alignment.stages.registry import kind_of

_LESS_OF_TRAINING = ("loss", "eval_loss", training.LOSS, training.LAST_LOSS, "objective/kl", "guard/kl")
_LESS_IS_BETTER = (*_LESS_OF_TRAINING, "log_loss", "brier", "ece")
_LESS_IS_BETTER_OF = ("loss/", "perplexity/")


def of_stage(config: StageConfig) -> Reported:
    """The metrics that a stage with these settings writes into its manifest."""
    return kind_of(config).metrics(config)


def missing(config: StageConfig, metric: str, stage: str) -> str:
    """Why a stage with these settings never reports a metric; empty if it does."""
    known = of_stage(config)
    if metric in known:
        return ""
    for beginning, (needed, remedy) in known.absent.items():
        if metric.startswith(beginning):
            return f"stage {stage!r} reports no {metric!r} without {needed}; set stages.{stage}.{remedy}"
    every = [*known.names, *(f"{family}…" for family in known.families)]
    if not every:
        return f"stage {stage!r} reports no metric; use the evaluation's, with arm: …"
    return f"stage {stage!r} reports no {metric!r}; {suggestion(metric, every)}"


def less_is_better(metric: str) -> bool:
    """Whether a larger value is worse."""
    return metric in _LESS_IS_BETTER or metric.startswith(_LESS_IS_BETTER_OF)


_ARM_METRICS = [metric.value for metric in ArmMetric]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A metric in the result of ``stage``: of an evaluation's ``arm``, or without an arm of the stage's manifest.
    ``shared`` names the other arms of that evaluation that are the same policy in every trial. ``chance`` is the
    metric's value by chance, if that is known."""

    stage: str
    arm: str
    metric: str
    minimize: bool
    shared: tuple[str, ...] = ()
    chance: float | None = None

    def __str__(self) -> str:
        return f"{self.metric} of {self.arm or self.stage}"

    def artifact(self, run_folder: Path) -> Path:
        """The result with the metric in the run in this folder."""
        return Path(RunRecord.read(run_folder).stages[self.stage].artifact)

    def read(self, artifact: Path) -> Interval:
        """The metric in a result, with its interval if it is a mean over prompts. Raises ConfigError: there is no such
        metric; the error lists those that exist; StageError: a grader or a judge gave too little to measure it by;
        NonFiniteError: it is not a finite number."""
        values = self._metrics(artifact)
        if self.metric not in values:
            if why := self._why_unknown(artifact):
                raise StageError(f"{self} is unknown: {why}", where=f"stage {self.stage}")
            setting = {"reward": "reward", "win_rate": "judge.kind"}.get(self.metric) if self.arm else None
            remedy = "choose another metric" + (f" or set stages.{self.stage}.{setting}" if setting else "")
            message = f"no stage reports {self}; it reports {', '.join(values) or 'no metrics'}"
            raise ConfigError(message, where="objective", remedy=remedy)
        if not math.isfinite(values[self.metric].mean):
            raise NonFiniteError(f"{self} is not a finite number", where=f"stage {self.stage}")
        return values[self.metric]

    def of_shared(self, artifact: Path) -> dict[str, Interval]:
        """The metric of the shared arms in a result, by their labels; an arm that lacks it is left out."""
        arms = [arm for arm in Evaluation.read(artifact).arms if arm.name in self.shared]
        values = {arm.label: arm.all_metrics.get(self.metric) for arm in arms}
        return {label: value for label, value in values.items() if value is not None and math.isfinite(value.mean)}

    def by_prompt(self, artifact: Path) -> dict[str, float]:
        """The metric in a result by prompt; empty if it is not recorded by prompt."""
        return paired_scores.scores(artifact, self.arm).get(self.metric, {}) if self.arm else {}

    def _why_unknown(self, artifact: Path) -> str:
        if not self.arm:
            return ""
        evaluation = Evaluation.read(artifact)
        if any(grading.metric == self.metric and self.arm in grading.left_out for grading in evaluation.gradings):
            return "too many of the grader's replies have no grade"
        pairs = evaluation.judge.pairs if evaluation.judge and self.metric == ArmMetric.win_rate.value else []
        return next((pair.why_nothing for pair in pairs if pair.arm == self.arm and pair.win_rate is None), "")

    def _metrics(self, artifact: Path) -> Mapping[str, Interval]:
        if not self.arm:
            manifest = read_manifest(artifact)
            metrics = manifest.metrics if manifest else {}
            return {name: Interval(mean=float(value)) for name, value in metrics.items()}
        arm = Evaluation.read(artifact).arm(self.arm)
        if arm is None:
            return {}
        return {name: value for name, value in arm.all_metrics.items() if name in arm.metrics or name in _ARM_METRICS}


def resolve(configs: Sequence[ObjectiveConfig], plans: Sequence[Plan]) -> tuple[Objective, ...]:
    """The objectives with the stages that report them; those with faults are left out. ``plans`` are of one recipe,
    with each value of the sweep's settings in at least one of them."""
    resolved = []
    stages = plans[0].config.stages
    for asked in configs:
        evaluations = _evaluations(stages, asked.arm)
        stage = asked.stage or next(iter(evaluations), "")
        if not stage:
            continue
        metric = asked.metric if asked.stage else _by_name(asked.metric, evaluations[stage])
        of_halves = of_stage(stages[stage]).half_by_chance
        is_half = metric.startswith(of_halves) if asked.stage else metric == ArmMetric.win_rate
        shared = _shared_arms(stage, asked.arm, plans) if asked.arm else ()
        resolved.append(
            Objective(
                stage=stage,
                arm=asked.arm,
                metric=metric,
                minimize=asked.minimize,
                shared=shared,
                chance=0.5 if is_half else None,
            )
        )
    return tuple(resolved)


def _shared_arms(evaluation: str, own: str, plans: Sequence[Plan]) -> tuple[str, ...]:
    first, *others = (stage for plan in plans for stage in plan.stages if stage.name == evaluation)
    return tuple(
        arm
        for arm in first.arms
        if arm != own and all(stage.input_fingerprints.get(arm) == first.input_fingerprints[arm] for stage in others)
    )


def faults(configs: Sequence[ObjectiveConfig], stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    """The faults of these objectives in a recipe with these stages."""
    if not configs:
        yield Fault(where="objective", message="no objective; write {arm: 'stage:dpo'}")
    for number, objective in enumerate(configs):
        where = f"objective[{number}]" if len(configs) > 1 else "objective"
        if message := _fault(objective, stages):
            yield Fault(where=where, message=message)


def cautions(objectives: Sequence[Objective], stages: Mapping[str, StageConfig]) -> tuple[str, ...]:
    """Warnings about the objectives for readers of the sweep's results."""
    return tuple(
        f"{objective} is measured on the training rows, so the best trial may be the one that overfits most; use a "
        f"metric on held-out rows, such as one from an evaluation"
        for objective in objectives
        if not objective.arm and objective.metric in of_stage(stages[objective.stage]).training
    )


def _fault(objective: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> str:
    if bool(objective.arm) == bool(objective.stage):
        return "write arm: … for a metric of the evaluation, or stage: … for a metric that a stage reports about itself"
    if objective.arm:
        return _fault_of_arm(objective, stages)
    metric, name = objective.metric, objective.stage
    less = metric in LESS_IS_BETTER or less_is_better(metric)
    if name in (evaluations := _evaluations(stages)):
        less = less or metric.partition("/")[0] in _less_is_better(evaluations[name])
    if name in stages:
        less = less or metric.startswith(of_stage(stages[name]).less_is_better)
    if less and not objective.minimize:
        return _WRONG_WAY.format(metric)
    if name not in stages:
        return f"the recipe has no stage {name!r}; {suggestion(name, stages)}"
    return missing(stages[name], metric, name)


def _fault_of_arm(objective: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> str:
    evaluations = _evaluations(stages, objective.arm)
    if not evaluations:
        arms = sorted({arm for stage in _evaluations(stages).values() for arm in stage.arms})
        remedy = suggestion(objective.arm, arms) if arms else "add an evaluate stage to the recipe, or use stage: …"
        return f"no stage reports {objective.metric} of {objective.arm!r}; {remedy}"
    name, stage = next(iter(evaluations.items()))
    metrics = recorded(stage.metrics)
    known = [*([PRIMARY] if metrics else []), *(metric.name for metric in metrics), *_ARM_METRICS]
    if objective.metric not in known:
        empty = f"stages.{name}.metrics is empty" if objective.metric == PRIMARY else ""
        return f"{empty or f'no evaluation reports {objective.metric!r}'}; {suggestion(objective.metric, known)}"
    asked = _by_name(objective.metric, stage)
    if asked in (*LESS_IS_BETTER, *_less_is_better(stage)) and not objective.minimize:
        return _WRONG_WAY.format(asked)
    return _never_reported(asked, objective.arm, stage, f"stages.{name}")


def _less_is_better(evaluation: Any) -> list[str]:
    return [metric.name for metric in recorded(evaluation.metrics) if not metric.higher_is_better]


_WRONG_WAY = "the less {} the better; set minimize: true"


def _by_name(metric: str, stage: Any) -> str:
    return primary_name(stage.metrics, stage.primary) or metric if metric == PRIMARY else metric


def _never_reported(metric: str, arm: str, stage: Any, where: str) -> str:
    log_ratios, temperature = (ArmMetric.greedy_log_ratio, ArmMetric.kl), stage.answers.temperature
    why = ""
    if metric == ArmMetric.reward and stage.reward is None:
        why = f"set {where}.reward to a reward model"
    elif metric == ArmMetric.greedy_log_ratio and temperature > 0.0:
        why = f"answers are sampled (temperature {temperature:g}); choose another metric"
    elif metric == ArmMetric.kl and temperature != 1.0:
        why = f"set {where}.answers.temperature to 1"
    elif metric in log_ratios and arm in (PROMPTED, FEW_SHOT):
        why = f"it has other prompts than {where}.reference, so choose another arm or metric"
    elif metric == ArmMetric.win_rate and stage.judge.kind is JudgeKind.none:
        why = f"set {where}.judge.kind to a judge, such as metric"
    elif metric == ArmMetric.win_rate:
        pairs = pairs_of(stage.judge, stage.arms, reference=stage.reference)
        compare = f"{where}.judge.pairs must compare it with {where}.reference, {stage.reference!r}"
        why = "" if (arm, stage.reference) in pairs else compare
    return f"no stage reports the {metric} of {arm!r}; {why}" if why else ""


def _evaluations(stages: Mapping[str, StageConfig], arm: str | None = None) -> dict[str, Any]:
    """Stages that evaluate arms, or this one; they have the fields of ``EvaluateConfig``."""
    evaluations: dict[str, Any] = {name: own for name, own in stages.items() if kind_of(own).produces == EVALUATION}
    return {name: own for name, own in evaluations.items() if arm is None or arm in own.arms}
