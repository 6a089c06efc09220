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


def sentences(stages: Sequence[PlannedStage]) -> Iterator[tuple[bool, str]]:
    """For each arm that was judged: whether it is within the limits, and a sentence with what it lost."""
    for stage, record in _measured(stages):
        for number, arm in enumerate(record.arms):
            if not arm.passed:
                yield False, f"stages.{stage.name}: {arm.label} forgot too much: {'; '.join(arm.reasons)}"
            elif number and record.judged:
                within = "; ".join(_within(arm, record.limits))
                yield True, f"stages.{stage.name}: {arm.label} is within the limits: {within}"


def remedies(stages: Sequence[PlannedStage], configs: Mapping[str, StageConfig]) -> list[str]:
    """What helps against it. ``configs`` are all stages of the run."""
    failed = [(stage, record) for stage, record in _measured(stages) if not record.passed]
    help_by_arm = {}
    for arm in (arm.name for _, record in failed for arm in record.arms if not arm.passed):
        name = arm.removeprefix("stage:")
        general = f"{arm} was trained elsewhere; train it with general rows, a lower learning rate or fewer epochs"
        own = configs.get(name)
        help_by_arm[arm] = general if own is None else kind_of(own).display.against_forgetting(name)
    limits = [f"stages.{stage.name}.max_perplexity_rise and max_ability_drop set the limits" for stage, _ in failed]
    return [*help_by_arm.values(), *limits]


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
