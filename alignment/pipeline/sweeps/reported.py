"""The metrics that a stage writes into its manifest, so that an objective that no stage reports is refused before the
first trial."""

from __future__ import annotations

from alignment.config.faults import suggestion
from alignment.config.stage import StageConfig
from alignment.records import training
from alignment.stages.base import Reported
from alignment.stages.registry import kind_of

_LESS_IS_BETTER = (
    "loss",
    "eval_loss",
    training.LOSS,
    training.LAST_LOSS,
    "log_loss",
    "brier",
    "ece",
    "objective/kl",
    "guard/kl",
)
_LESS_IS_BETTER_OF = ("loss/", "perplexity/")


def of_stage(config: StageConfig) -> Reported:
    """The metrics that a stage with these settings writes into its manifest."""
    return kind_of(config).outcome.metrics(config)


def missing(config: StageConfig, metric: str, stage: str) -> str:
    """Why a stage with these settings never reports a metric; empty if it does."""
    known = of_stage(config)
    if metric in known:
        return ""
    if why := kind_of(config).outcome.why_missing(config, metric, stage):
        return why
    every = [*known.names, *(f"{family}…" for family in known.families)]
    if not every:
        return f"stage {stage!r} reports no metric; use the evaluation's, with arm: …"
    return f"stage {stage!r} reports no {metric!r}; {suggestion(metric, every)}"


def less_is_better(metric: str) -> bool:
    """Whether a larger value is worse."""
    return metric in _LESS_IS_BETTER or metric.startswith(_LESS_IS_BETTER_OF)
