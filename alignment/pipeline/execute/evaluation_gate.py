"""The gates of the evaluations of a run: which are met and which are not, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.core.artifacts import read_manifest
from alignment.evaluation.gate_outcomes import GateOutcome, outcomes
from alignment.pipeline.plan.plan import PlannedStage
from alignment.records.evaluation import Evaluation
from alignment.stages.registry import kind_of


def not_met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is not met: the difference with its interval, and what is required."""
    return [sentence for stage in stages for sentence in _of_stage(stage)]


def met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is met: the difference with its interval, and what is required."""
    return [
        f"stages.{stage.name}.gate[{number}] is met: {outcome.in_words()}"
        for stage in stages
        for number, outcome in enumerate(_outcomes(stage) or ())
        if outcome.met
    ]


def remedies(stages: Sequence[PlannedStage]) -> list[str]:
    """Where the gates are set that are not met, and what helps."""
    return [_remedy(stage) for stage in stages if any(_of_stage(stage))]


def _of_stage(stage: PlannedStage) -> Iterator[str]:
    judged = _outcomes(stage)
    if judged is None:
        yield f"stages.{stage.name}.gate: {stage.artifact} has no evaluation.json; delete it to remake it"
        return
    for number, outcome in enumerate(judged):
        if not outcome.met:
            yield f"stages.{stage.name}.gate[{number}]: {outcome.in_words()}"


def _remedy(stage: PlannedStage) -> str:
    remedy = f"stages.{stage.name}.gate sets the requirement"
    if any(outcome.more_prompts_may_help for outcome in _outcomes(stage) or ()):
        remedy += "; more prompts make the intervals narrower"
    return remedy


def _outcomes(stage: PlannedStage) -> list[GateOutcome] | None:
    gates = kind_of(stage.config).outcome.gates(stage.config)
    if not gates or read_manifest(stage.artifact) is None:
        return []
    try:
        return outcomes(gates, Evaluation.read(stage.artifact), stage.artifact)
    except FileNotFoundError:
        return None
