"""What a sweep tries, and by what it judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Search(str, Enum):
    """``grid``: every combination of values, once. ``tpe``: where trials went well before (Bergstra et al. 2011)."""

    grid = "grid"
    tpe = "tpe"


class Metric(str, Enum):
    """A figure of an evaluation's arm: a mean over held-out prompts."""

    gold = "gold"
    style = "style"
    facts = "facts"
    reward = "reward"
    kl = "kl"


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """``metric`` of ``arm`` in the recipe's evaluation, the more the better, or the less."""

    arm: str = ""
    metric: Metric = Metric.gold
    minimize: bool = False


@dataclass(kw_only=True, slots=True)
class ParameterConfig:
    """A setting of the recipe by its dotted ``key``: one of ``values``, or a number from ``low`` to ``high``.

    ``log`` draws numbers evenly by their size; ``whole`` draws whole ones.
    """

    key: str = ""
    values: list[str] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """``trials`` is how many ``tpe`` makes; a grid makes all."""

    summary: str = ""
    search: Search = Search.grid
    trials: int | None = None
    seed: int = 0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parameters: list[ParameterConfig] = field(default_factory=list)
