"""What a sweep tries, and how it judges trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import FILLED, FINITE, NOT_NEGATIVE, POSITIVE


class Search(str, Enum):
    """``grid``: every combination of values, once. ``tpe``: values near those of trials that did well (Bergstra et al.
    2011)."""

    grid = "grid"
    tpe = "tpe"


PRIMARY = "primary"
"""Stands for the primary metric of an evaluation."""


class ArmMetric(str, Enum):
    """What an evaluation reports about an arm in addition to the recipe's metrics: a mean over held-out prompts.

    ``win_rate`` comes from the evaluation's judge."""

    reward = "reward"
    greedy_log_ratio = "greedy_log_ratio"
    kl = "kl"
    win_rate = "win_rate"
    loss = "loss"
    perplexity = "perplexity"


LESS_IS_BETTER = (ArmMetric.greedy_log_ratio, ArmMetric.kl, ArmMetric.loss, ArmMetric.perplexity)


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """A figure to maximise, or to minimise: ``metric`` of an ``arm`` of the recipe's evaluation, or of the metrics in
    a ``stage``'s manifest, such as a reward model's ``eval_accuracy``.

    For an arm it is ``primary``, the name of a metric of the evaluation, or an ``ArmMetric``."""

    arm: Annotated[str, FILLED] = ""
    stage: Annotated[str, FILLED] = ""
    metric: Annotated[str, FILLED] = PRIMARY
    minimize: bool = False


class Pruner(str, Enum):
    """``median`` stops a trial whose latest figures are worse, on average, than the median of finished trials there."""

    none = "none"
    median = "median"


@dataclass(kw_only=True, slots=True)
class PruningConfig:
    """Stops trials early, by ``metric`` in the metrics.jsonl of ``stage``, which is to be minimised or maximised.

    The objective is measured after that stage, so this may stop a trial that would have been the best. Nothing is
    stopped before ``startup_trials`` trials have finished, nor in the first ``warmup_steps`` steps (updates in RL) of a
    trial."""

    pruner: Pruner = Pruner.none
    stage: str = ""
    metric: str = "loss"
    minimize: bool = True
    startup_trials: Annotated[int, POSITIVE] = 4
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0


@dataclass(kw_only=True, slots=True)
class ParameterConfig:
    """A setting of the recipe by its dotted ``key``: one of ``values``, or a number from ``low`` to ``high``.

    ``log`` draws numbers evenly on a log scale; ``whole`` draws integers."""

    key: Annotated[str, FILLED] = ""
    values: list[str] = field(default_factory=list)
    low: Annotated[float | None, FINITE] = None
    high: Annotated[float | None, FINITE] = None
    log: bool = False
    whole: bool = False


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """``trials`` is the number of trials for ``tpe``; a grid runs every combination. A file may give one ``objective``
    without a list."""

    summary: str = ""
    search: Search = Search.grid
    trials: Annotated[int | None, POSITIVE] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    objective: list[ObjectiveConfig] = field(default_factory=list)
    parameters: Annotated[list[ParameterConfig], FILLED] = field(default_factory=list)
    pruning: PruningConfig = field(default_factory=PruningConfig)
