"""The gates of the evaluations of a run: which are met and which are not, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.core.artifacts import read_manifest
from alignment.evaluation.paired_scores import GateOutcome, outcomes
from alignment.pipeline.plan.plan import PlannedStage
from alignment.records.evaluation import Evaluation
from alignment.stages.registry import gates_of


def sentences(stages: Sequence[PlannedStage]) -> Iterator[tuple[bool, str]]:
    """For each gate: whether it is met, and a sentence with the difference, its interval and what is required."""
    for stage in stages:
        for number, outcome in enumerate(_outcomes(stage)):
            is_met = " is met" if outcome.met else ""
            yield outcome.met, f"stages.{stage.name}.gate[{number}]{is_met}: {outcome.in_words()}"


def remedies(stages: Sequence[PlannedStage]) -> Iterator[str]:
    """Where the gates are set that are not met, and what helps."""
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
