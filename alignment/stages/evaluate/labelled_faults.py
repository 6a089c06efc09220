"""Checks the labelled pairs of a judge when a run is planned: whether the judge can judge them, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from alignment.config.evaluating import JudgeConfig, JudgeKind, LabelledConfig
from alignment.config.faults import Fault
from alignment.config.scoring import MetricConfig
from alignment.evaluation.metrics import primary_name
from alignment.rewards.rules.all_rules import rule_of
from alignment.rewards.scorer_sources import CHOICE
from alignment.stages.evaluate.config import EvaluateConfig

JUDGES = (JudgeKind.metric, JudgeKind.reward, JudgeKind.endpoint)
"""The judges that can be given any two answers."""
DATA = "judge.labelled.data"


def labels_pairs(judge: JudgeConfig) -> bool:
    """Whether the judge is held against people's labels."""
    return bool(judge.labelled.data.source) and judge.kind in JUDGES


def primary_metric(config: EvaluateConfig) -> MetricConfig | None:
    """The settings of the metric that arms are compared by."""
    name = primary_name(config.metrics, config.primary)
    return next((metric for metric in config.metrics if metric.name == name), None)


def labelled_faults(stage: EvaluateConfig, where: str) -> Iterator[Fault]:
    """All faults in the settings of labelled pairs; ``where`` is the stage's key."""
    judge, path = stage.judge, f"{where}.judge.labelled"
    if judge.labelled == LabelledConfig():
        return
    if judge.kind not in JUDGES:
        kinds = ", ".join(kind.value for kind in JUDGES)
        message = f"unused: a judge of the kind {judge.kind.value!r} cannot judge pairs from a file; only {kinds} can"
        yield Fault(where=path, message=message)
    elif not judge.labelled.data.source:
        message = "missing, so the other settings are unused; name preference pairs that people have labelled"
        yield Fault(where=f"{path}.data.source", message=message)
    metric = primary_metric(stage)
    if judge.kind is JudgeKind.metric and metric is not None and metric.source == CHOICE:
        message = (
            f"the primary metric has the source {CHOICE!r}, which does not score answers; choose another judge.kind"
        )
        yield Fault(where=path, message=message)


def labelled_checks(config: EvaluateConfig) -> tuple[Callable[[Any], object], ...]:
    """Checks for what the primary metric reads in a labelled row, if it is the judge."""
    metric = primary_metric(config)
    if config.judge.kind is not JudgeKind.metric or metric is None:
        return ()

    def check(record: Any) -> None:
        rule = rule_of(metric)
        if rule is not None:
            rule.expected(record)

    return (check,)
