"""Checks the grader's settings when a run is planned."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault
from alignment.config.grader import GraderConfig
from alignment.config.scoring import MetricConfig, pass_size
from alignment.evaluation.endpoint_faults import client_missing, endpoint_faults, scale_faults
from alignment.rewards.scorer_sources import GRADE
from alignment.stages.evaluate.config import EvaluateConfig


def is_graded(config: EvaluateConfig) -> bool:
    """Whether a metric asks the grader."""
    return any(metric.source == GRADE for metric in config.metrics)


def grader_faults(stage: EvaluateConfig, where: str, *, hang_seconds: float) -> Iterator[Fault]:
    """All faults in the grader's settings and in the metrics that use it; ``where`` is the stage's key.

    A stage that makes no progress for ``hang_seconds`` is stopped; 0 turns this off.
    """
    for number, metric in enumerate(stage.metrics):
        if metric.rubric is not None and metric.source != GRADE:
            message = f"has no effect; only the source '{GRADE}' uses it, but source is '{metric.source}'"
            yield Fault(where=f"{where}.metrics[{number}].rubric", message=message)
        elif metric.source == GRADE and (message := client_missing(GRADE)):
            yield Fault(where=f"{where}.metrics[{number}].source", message=message)
    grader, path = stage.grader, f"{where}.grader"
    if is_graded(stage):
        yield from endpoint_faults(grader.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        yield from scale_faults(grader, path)
        yield from _passing_faults(grader, stage.metrics, where)
    elif grader != GraderConfig():
        message = f"unused, because no metric has the source '{GRADE}'; add one, or remove the grader"
        yield Fault(where=path, message=message)


def _passing_faults(grader: GraderConfig, metrics: list[MetricConfig], where: str) -> Iterator[Fault]:
    """A passing score that every grade reaches, or none does, makes pass@K say nothing."""
    for number, metric in enumerate(metrics):
        splits = grader.lowest < metric.passing_score <= grader.highest
        if metric.source == GRADE and pass_size(metric.aggregate) is not None and not splits:
            message = (
                f"{metric.passing_score:g} lets all grades pass or none, because grades go from {grader.lowest} to "
                f"{grader.highest}; choose a value above {grader.lowest} and at most {grader.highest}"
            )
            yield Fault(where=f"{where}.metrics[{number}].passing_score", message=message)
