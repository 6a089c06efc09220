"""What a sweep tries, and by what it judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import FILLED, FINITE, NOT_NEGATIVE, POSITIVE


class Search(str, Enum):
    """``grid``: every combination of values, once. ``tpe``: where trials went well before (Bergstra et al. 2011)."""

    grid = "grid"
    tpe = "tpe"


PRIMARY = "primary"
"""Stands for the primary metric of an evaluation."""


class ArmMetric(str, Enum):
    """What an evaluation reports of an arm beside the recipe's metrics: a mean over held-out prompts.

    ``win_rate`` is by the evaluation's judge.
    """

    reward = "reward"
    greedy_log_ratio = "greedy_log_ratio"
    win_rate = "win_rate"
    loss = "loss"
    perplexity = "perplexity"


LESS_IS_BETTER = (ArmMetric.greedy_log_ratio, ArmMetric.loss, ArmMetric.perplexity)


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """A figure, the more the better, or the less: ``metric`` of an ``arm`` of the recipe's evaluation, or of what a
    ``stage`` says of itself in its manifest, such as a reward model's ``eval_accuracy``.

    Of an arm it is ``primary``, a metric of the evaluation by its name, or a ``ArmMetric``.
    """

    arm: Annotated[str, FILLED] = ""
    stage: Annotated[str, FILLED] = ""
    metric: Annotated[str, FILLED] = PRIMARY
    minimize: bool = False


class Pruner(str, Enum):
    """``median``: a trial whose latest figures are worse, in the mean, than the median of finished trials' there."""

    none = "none"
    median = "median"


@dataclass(kw_only=True, slots=True)
class PruningConfig:
    """Trials that are stopped early, by ``metric`` in the metrics.jsonl of ``stage``, the less the better or the more.

    The objective comes after that stage, so this may stop a trial that would have been the best. The first
    ``startup_trials`` finished trials and the first ``warmup_steps`` steps of each are left alone.
    """

    pruner: Pruner = Pruner.none
    stage: str = ""
    metric: str = "loss"
    minimize: bool = True
    startup_trials: Annotated[int, POSITIVE] = 4
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0


@dataclass(kw_only=True, slots=True)
class ParameterConfig:
    """A setting of the recipe by its dotted ``key``: one of ``values``, or a number from ``low`` to ``high``.

    ``log`` draws numbers evenly by their size; ``whole`` draws whole ones.
    """

    key: Annotated[str, FILLED] = ""
    values: list[str] = field(default_factory=list)
    low: Annotated[float | None, FINITE] = None
    high: Annotated[float | None, FINITE] = None
    log: bool = False
    whole: bool = False


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """``trials`` is how many ``tpe`` makes; a grid makes all. A file may give its one ``objective`` without a list."""

    summary: str = ""
    search: Search = Search.grid
    trials: Annotated[int | None, POSITIVE] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    objective: list[ObjectiveConfig] = field(default_factory=list)
    parameters: Annotated[list[ParameterConfig], FILLED] = field(default_factory=list)
    pruning: PruningConfig = field(default_factory=PruningConfig)
