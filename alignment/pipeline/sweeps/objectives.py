"""What a sweep judges its trials by: looked up in the recipe before anything starts, read from each run when done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.did_you_mean import suggestion
from alignment.config.evaluation import FEW_SHOT, PROMPTED, JudgeKind
from alignment.config.faults import Fault
from alignment.config.stage import EvaluateConfig, StageConfig
from alignment.config.sweep import LESS_IS_BETTER, Metric, ObjectiveConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import ConfigError, NonFiniteError
from alignment.evaluation.pairwise import pairs_of
from alignment.pipeline.execute import paired_differences
from alignment.pipeline.execute.record import read_record
from alignment.pipeline.sweeps import reported
from alignment.records.interval import Interval

_METRICS = [metric.value for metric in Metric]


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
        return Path(read_record(run_folder)["stages"][self.stage]["artifact"])

    def read(self, artifact: Path) -> Interval:
        """The figure in a result, with its interval where it is a mean over prompts.

        Raises:
            ConfigError: there is no such figure; says which there are.
            NonFiniteError: it is no finite number.
        """
        told = self._told(artifact)
        value = told.get(self.metric)
        found = value if isinstance(value, Mapping) else {"mean": value, "low": None, "high": None}
        if not isinstance(found["mean"], (int, float)):
            raise ConfigError(
                f"no stage reports {self}; it reports {', '.join(self._names(told)) or 'nothing to go by'}",
                where="objective",
                remedy=f"take another metric{self._wanting()}",
            )
        if not math.isfinite(found["mean"]):
            raise NonFiniteError(f"{self} is not a finite number", where=f"stage {self.stage}")
        return Interval(mean=float(found["mean"]), low=found["low"], high=found["high"])

    def by_prompt(self, artifact: Path) -> dict[str, float]:
        """The figure in a result prompt by prompt; empty where it is not kept so."""
        return paired_differences.scores(artifact, self.arm).get(self.metric, {}) if self.arm else {}

    def _names(self, told: Mapping[str, Any]) -> list[str]:
        """Figures that could be asked for instead."""
        named = [name for name, value in told.items() if isinstance(value, (Mapping, int, float))]
        return [name for name in named if name in _METRICS] if self.arm else named

    def _wanting(self) -> str:
        wanted = {Metric.reward: "reward", Metric.win_rate: "judge.kind"}
        setting = wanted.get(Metric(self.metric)) if self.arm else None
        return f" or set stages.{self.stage}.{setting}" if setting else ""

    def _told(self, artifact: Path) -> Mapping[str, Any]:
        if not self.arm:
            manifest = read_manifest(artifact)
            return manifest.metrics if manifest else {}
        arms = json.loads((artifact / "evaluation.json").read_text(encoding="utf-8"))["arms"]
        return next((one for one in arms if one["name"] == self.arm), {})


def resolve(configs: Sequence[ObjectiveConfig], stages: Mapping[str, StageConfig]) -> tuple[Objective, ...]:
    """The objectives by the stages that tell them; those with faults are left out."""
    return tuple(
        Objective(stage=stage, arm=one.arm, metric=one.metric, minimize=one.minimize)
        for one in configs
        if (stage := one.stage or next(iter(_telling(one, stages)), ""))
    )


def faults(configs: Sequence[ObjectiveConfig], stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    """Why these cannot be objectives of a recipe with these stages."""
    if not configs:
        yield Fault(where="objective", message="by what? write {arm: 'stage:dpo', metric: gold}")
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
    if (one.metric in LESS_IS_BETTER or reported.less_is_better(one.metric)) and not one.minimize:
        return f"the less {one.metric} the better; set minimize: true"
    if one.stage:
        if one.stage not in stages:
            return f"the recipe has no stage {one.stage!r}; {suggestion(one.stage, stages)}"
        return reported.missing(stages[one.stage], one.metric, one.stage)
    if one.metric not in _METRICS:
        return f"no evaluation reports {one.metric!r}; {suggestion(one.metric, _METRICS)}"
    telling = _telling(one, stages)
    if not telling:
        arms = sorted({arm for stage in stages.values() if isinstance(stage, EvaluateConfig) for arm in stage.arms})
        remedy = suggestion(one.arm, arms) if arms else "add an evaluate stage to the recipe, or take stage: …"
        return f"no stage reports {one.metric} of {one.arm!r}; {remedy}"
    first = next(iter(telling))
    return _never_told(Metric(one.metric), one.arm, telling[first], f"stages.{first}")


def _never_told(metric: Metric, arm: str, stage: EvaluateConfig, where: str) -> str:
    """Why the evaluation will not tell this of an arm that it has, as far as its settings say; else nothing."""
    lacking = f"no stage reports the {metric.value} of {arm!r}; "
    if metric is Metric.reward and stage.reward is None:
        return f"{lacking}give {where}.reward a reward model"
    if metric is Metric.greedy_log_ratio and arm in (PROMPTED, FEW_SHOT):
        return f"{lacking}it is asked other prompts than {where}.reference, so take another arm or metric"
    if metric is not Metric.win_rate:
        return ""
    if stage.judge.kind is JudgeKind.none:
        return f"{lacking}give {where}.judge.kind a judge, such as rule"
    if (arm, stage.reference) not in pairs_of(stage.judge, stage.arms, reference=stage.reference):
        return f"{lacking}{where}.judge.pairs has to hold it against {where}.reference, {stage.reference!r}"
    return ""


def _telling(one: ObjectiveConfig, stages: Mapping[str, StageConfig]) -> dict[str, EvaluateConfig]:
    """The evaluations that have the arm."""
    found = {name: stage for name, stage in stages.items() if isinstance(stage, EvaluateConfig)}
    return {name: stage for name, stage in found.items() if one.arm in stage.arms}
