"""The gates of a run: what its evaluations and measurements of forgetting have to meet, in new and in reused results.

They are checked once all stages are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alignment.config.stage import StageConfig
from alignment.core.artifacts import FORGETTING, read_manifest
from alignment.core.errors import GateNotMet
from alignment.evaluation.paired_scores import GateOutcome, outcomes
from alignment.pipeline.plan.plan import PlannedStage
from alignment.records.evaluation import Evaluation
from alignment.records.interval import Interval
from alignment.records.stages import ArmForgetting, Forgetting, Limits
from alignment.stages.registry import gates_of, kind_of

NOT_MET = "gate not met"
"""The state of a run whose stages are all done, but whose results do not meet a gate."""


def not_met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is not met."""
    return [sentence for is_met, sentence in (*_forgotten(stages), *_evaluated(stages)) if not is_met]


def met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is met: what was measured, and what is required."""
    return [sentence for is_met, sentence in (*_forgotten(stages), *_evaluated(stages)) if is_met]


def refuse(stages: Sequence[PlannedStage], configs: Mapping[str, StageConfig]) -> None:
    """Refuses results that do not meet the gates of these stages. ``configs`` are all stages of the run. Raises
    GateNotMet: names each gate, what was measured, and the remedies."""
    if sentences := not_met(stages):
        remedies = [*_against_forgetting(stages, configs), *_against_unmet(stages)]
        raise GateNotMet("\n  ".join(sentences), remedy="\n  → ".join(remedies))


def _evaluated(stages: Sequence[PlannedStage]) -> Iterator[tuple[bool, str]]:
    for stage in stages:
        for number, outcome in enumerate(_outcomes(stage)):
            is_met = " is met" if outcome.met else ""
            yield outcome.met, f"stages.{stage.name}.gate[{number}]{is_met}: {outcome.in_words()}"


def _against_unmet(stages: Sequence[PlannedStage]) -> Iterator[str]:
    for stage in stages:
        unmet = [outcome for outcome in _outcomes(stage) if not outcome.met]
        if unmet:
            may_help = any(outcome.more_prompts_may_help for outcome in unmet)
            more = "; more prompts make the intervals narrower" if may_help else ""
            yield f"stages.{stage.name}.gate sets the requirement{more}"


def _outcomes(stage: PlannedStage) -> list[GateOutcome]:
    gates = gates_of(stage.config)
    if not gates or read_manifest(stage.artifact) is None:
        return []
    return outcomes(gates, Evaluation.read(stage.artifact), stage.artifact)


def _forgotten(stages: Sequence[PlannedStage]) -> Iterator[tuple[bool, str]]:
    for stage, record in _measured(stages):
        for number, arm in enumerate(record.arms):
            if not arm.passed:
                yield False, f"stages.{stage.name}: {arm.label} forgot too much: {'; '.join(arm.reasons)}"
            elif number and record.judged:
                within = "; ".join(_within(arm, record.limits))
                yield True, f"stages.{stage.name}: {arm.label} is within the limits: {within}"


def _against_forgetting(stages: Sequence[PlannedStage], configs: Mapping[str, StageConfig]) -> list[str]:
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
