"""The gate of a measurement of forgetting: which policies are within the limits, which lost more, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alignment.config.stage import StageConfig
from alignment.core.artifacts import FORGETTING, read_manifest
from alignment.pipeline.plan.plan import PlannedStage
from alignment.records.interval import Interval
from alignment.records.stages import ArmForgetting, Forgetting, Limits
from alignment.stages.registry import kind_of


def not_met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each arm that lost too much."""
    return [sentence for stage, record in _failed(stages) for sentence in _sentences(stage.name, record)]


def met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each trained arm that is within the limits; none if there are no limits."""
    return [
        f"stages.{stage.name}: {arm.label} is within the limits: {'; '.join(_within(arm, record.limits))}"
        for stage, record in _measured(stages)
        if record.judged
        for arm in record.arms[1:]
        if arm.passed
    ]


def remedies(stages: Sequence[PlannedStage], configs: Mapping[str, StageConfig]) -> list[str]:
    """What helps against it. ``configs`` are all stages of the run."""
    failed = _failed(stages)
    arms = [arm.name for _, record in failed for arm in record.arms if not arm.passed]
    limits = [f"stages.{stage.name}.max_perplexity_rise and max_ability_drop set the limits" for stage, _ in failed]
    return [*(_remedy(arm, configs) for arm in dict.fromkeys(arms)), *limits]


def read_outcome(artifact: Path) -> Forgetting | None:
    """The record of an artifact, or None if it has none yet. Raises ArtifactError: it is damaged, or was written by a
    newer version."""
    try:
        return Forgetting.read(artifact)
    except FileNotFoundError:
        return None


def _measured(stages: Sequence[PlannedStage]) -> list[tuple[PlannedStage, Forgetting]]:
    measured = [stage for stage in stages if kind_of(stage.config).produces == FORGETTING]
    records = [(stage, read_outcome(stage.artifact)) for stage in measured if read_manifest(stage.artifact) is not None]
    return [(stage, record) for stage, record in records if record is not None]


def _failed(stages: Sequence[PlannedStage]) -> list[tuple[PlannedStage, Forgetting]]:
    return [(stage, record) for stage, record in _measured(stages) if not record.passed]


def _within(arm: ArmForgetting, limits: Limits) -> Iterator[str]:
    if arm.rise is not None and limits.perplexity_rise is not None:
        rise = _percent(arm.rise)
        yield f"perplexity of general text {rise}, required: a rise of at most {limits.perplexity_rise:.1%}"
    if arm.drop is not None and limits.ability_drop is not None:
        low, high = arm.drop.bounds or (None, None)
        turned = Interval(mean=-arm.drop.mean, low=None if high is None else -high, high=None if low is None else -low)
        change = _percent(turned)
        yield f"questions answered right {change}, required: a drop of at most {limits.ability_drop:.1%}"


def _percent(change: Interval) -> str:
    """``+2.0% (+1.5% to +2.5%)``, without bounds that are not known."""
    bounds = "" if change.bounds is None else f" ({change.bounds[0]:+z.1%} to {change.bounds[1]:+z.1%})"
    return f"{change.mean:+z.1%}{bounds}"


def _sentences(stage: str, record: Forgetting) -> Iterator[str]:
    for arm in record.arms:
        if not arm.passed:
            yield f"stages.{stage}: {arm.label} forgot too much: {'; '.join(arm.reasons)}"


def _remedy(arm: str, configs: Mapping[str, StageConfig]) -> str:
    name = arm.removeprefix("stage:")
    config = configs.get(name)
    if config is None:
        return (
            f"{arm} was trained elsewhere; train it with general rows mixed in, a lower learning rate or fewer epochs"
        )
    return kind_of(config).outcome.against_forgetting(name)
