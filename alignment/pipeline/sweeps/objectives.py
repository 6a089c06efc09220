"""What a sweep judges its trials by: looked up in the recipe before anything starts, read from each run when done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.did_you_mean import suggestion
from alignment.config.evaluating import FEW_SHOT, PROMPTED, JudgeKind
from alignment.config.faults import Fault
from alignment.config.stage import StageConfig
from alignment.config.sweep import LESS_IS_BETTER, PRIMARY, Figure, ObjectiveConfig
from alignment.core.artifacts import EVALUATION, read_manifest
from alignment.core.errors import ConfigError, NonFiniteError
from alignment.evaluation.metrics import primary_name, recorded
from alignment.evaluation.pairwise import pairs_of
from alignment.pipeline.execute import paired_differences
from alignment.pipeline.sweeps import reported
from alignment.records.evaluation import Evaluation
from alignment.records.interval import Interval
from alignment.records.run import RunRecord
from alignment.stages.registry import kind_of

_FIGURES = [figure.value for figure in Figure]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A figure in the result of ``stage``: of an evaluation's ``arm``, or, without one, of the stage's manifest."""

    stage: str
    arm: str
    metric: str
    minimize: bool

    def __str__(self) -> str:
        return f"{self.metric} of {self.arm or self.stage}"

    def artifact(self, run_folder: Path) -> Path:
        """The result that tells the figure, as the run in this folder now has it."""
        return Path(RunRecord.read(run_folder).stages[self.stage].artifact)

    def read(self, artifact: Path) -> Interval:
        """The figure in a result, with its interval where it is a mean over prompts.

        Raises:
            ConfigError: there is no such figure; says which there are.
            NonFiniteError: it is no finite number.
        """
        figures = self._figures(artifact)
        if self.metric not in figures:
            raise ConfigError(
                f"no stage reports {self}; it reports {', '.join(figures) or 'nothing to go by'}",
                where="objective",
                remedy=f"take another metric{self._wanting()}",
            )
        if not math.isfinite(figures[self.metric].mean):
            raise NonFiniteError(f"{self} is not a finite number", where=f"stage {self.stage}")
        return figures[self.metric]

    def by_prompt(self, artifact: Path) -> dict[str, float]:
        """The figure in a result prompt by prompt; empty where it is not kept so."""
        return paired_differences.scores(artifact, self.arm).get(self.metric, {}) if self.arm else {}

    def _wanting(self) -> str:
        setting = {"reward": "reward", "win_rate": "judge.kind"}.get(self.metric) if self.arm else None
        return f" or set stages.{self.stage}.{setting}" if setting else ""

    def _figures(self, artifact: Path) -> Mapping[str, Interval]:
        """What the result reports of the arm, or of the stage, and can be asked for, by name."""
        if not self.arm:
            manifest = read_manifest(artifact)
            metrics = manifest.metrics if manifest else {}
            return {name: Interval(mean=float(value)) for name, value in metrics.items()}
        arm = Evaluation.read(artifact).arm(self.arm)
        if arm is None:
            return {}
        return {name: value for name, value in arm.figures.items() if name in arm.metrics or name in _FIGURES}


def resolve(configs: Sequence[ObjectiveConfig], stages: Mapping[str, StageConfig]) -> tuple[Objective, ...]:
    """The objectives by the stages that report them; those with faults are left out."""
    resolved = []
    for one in configs:
        evaluations = _evaluations_of(one, stages)
        stage = one.stage or next(iter(evaluations), "")
        if stage:
            metric = one.metric if one.stage else _by_name(one.metric, evaluations[stage])
            resolved.append(Objective(stage=stage, arm=one.arm, metric=metric, minimize=one.minimize))
    return tuple(resolved)


def faults(configs: Sequence[ObjectiveConfig], stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    """Why these cannot be objectives of a recipe with these stages."""
    if not configs:
        yield Fault(where="objective", message="by what? write {arm: 'stage:dpo'}")
    for number, one in enumerate(configs):
        where = f"objective[{number}]" if len(configs) > 1 else "objective"
        if message := _fault(one, stages):
            yield Fault(where=where, message=message)


def cautions(objectives: Sequence[Objective], stages: Mapping[str, StageConfig]) -> tuple[str, ...]:
    """What a reader of the sweep's outcome has to know of what it is judged by."""
    return tuple(
        f"{one} comes from the rows that the stage learns from, so the best trial may be the one that fits these "
        "closest; a figure on held-out rows says more, such as one of an evaluation"
        for one in objectives
        if not one.arm and one.metric in reported.of_stage(stages[one.stage]).training
    )


def _fault(one: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> str:
    if bool(one.arm) == bool(one.stage):
        return "write arm: … for a figure of the evaluation, or stage: … for one that a stage reports of itself"
    return _fault_of_stage(one, stages) if one.stage else _fault_of_arm(one, stages)


def _fault_of_stage(one: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> str:
    less = one.metric in LESS_IS_BETTER or reported.less_is_better(one.metric)
    if one.stage in (evaluations := _evaluations(stages)):
        less = less or one.metric.partition("/")[0] in _less_is_better(evaluations[one.stage])
    if less and not one.minimize:
        return _WRONG_WAY.format(one.metric)
    if one.stage not in stages:
        return f"the recipe has no stage {one.stage!r}; {suggestion(one.stage, stages)}"
    return reported.missing(stages[one.stage], one.metric, one.stage)


def _fault_of_arm(one: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> str:
    evaluations = _evaluations_of(one, stages)
    if not evaluations:
        arms = sorted({arm for stage in _evaluations(stages).values() for arm in stage.arms})
        remedy = suggestion(one.arm, arms) if arms else "add an evaluate stage to the recipe, or take stage: …"
        return f"no stage reports {one.metric} of {one.arm!r}; {remedy}"
    name, stage = next(iter(evaluations.items()))
    metrics = recorded(stage.metrics)
    known = [*([PRIMARY] if metrics else []), *(metric.name for metric in metrics), *_FIGURES]
    if one.metric not in known:
        why = f"stages.{name}.metrics names none" if one.metric == PRIMARY else f"no evaluation reports {one.metric!r}"
        return f"{why}; {suggestion(one.metric, known)}"
    asked = _by_name(one.metric, stage)
    if asked in (*LESS_IS_BETTER, *_less_is_better(stage)) and not one.minimize:
        return _WRONG_WAY.format(asked)
    return _never_reported(asked, one.arm, stage, f"stages.{name}")


def _less_is_better(evaluation: Any) -> list[str]:
    """The names of the recipe's own metrics of which less is better."""
    return [metric.name for metric in recorded(evaluation.metrics) if not metric.higher_is_better]


_WRONG_WAY = "the less {} the better; set minimize: true"


def _by_name(metric: str, stage: Any) -> str:
    """The metric's own name, also where ``primary`` stands for it."""
    return primary_name(stage.metrics, stage.primary) or metric if metric == PRIMARY else metric


def _never_reported(metric: str, arm: str, stage: Any, where: str) -> str:
    """Why the evaluation will not report this of an arm that it has, as far as its settings say; else nothing."""
    lacking = f"no stage reports the {metric} of {arm!r}; "
    if metric == Figure.reward and stage.reward is None:
        return f"{lacking}give {where}.reward a reward model"
    if metric == Figure.greedy_log_ratio and arm in (PROMPTED, FEW_SHOT):
        return f"{lacking}it is asked other prompts than {where}.reference, so take another arm or metric"
    if metric != Figure.win_rate:
        return ""
    if stage.judge.kind is JudgeKind.none:
        return f"{lacking}give {where}.judge.kind a judge, such as metric"
    if (arm, stage.reference) not in pairs_of(stage.judge, stage.arms, reference=stage.reference):
        return f"{lacking}{where}.judge.pairs has to hold it against {where}.reference, {stage.reference!r}"
    return ""


def _evaluations_of(one: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> dict[str, Any]:
    """The evaluations that have the arm."""
    return {name: stage for name, stage in _evaluations(stages).items() if one.arm in stage.arms}


def _evaluations(stages: Mapping[str, StageConfig]) -> dict[str, Any]:
    """Settings of the stages that evaluate arms; they have the fields of ``EvaluateConfig``."""
    return {name: stage for name, stage in stages.items() if kind_of(stage).produces == EVALUATION}
