"""The gates of a run: what its results have to meet, checked once all stages are done, in new and in reused results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignment.config.stage import StageConfig
from alignment.core.errors import GateNotMet
from alignment.pipeline.execute import evaluation_gate, forgetting_gate
from alignment.pipeline.plan.plan import PlannedStage

NOT_MET = "gate not met"
"""The state of a run whose stages are all done, but whose results do not meet a gate."""


def not_met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is not met."""
    return [sentence for is_met, sentence in _judged(stages) if not is_met]


def met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is met: what was measured, and what is required."""
    return [sentence for is_met, sentence in _judged(stages) if is_met]


def _judged(stages: Sequence[PlannedStage]) -> list[tuple[bool, str]]:
    return [*forgetting_gate.sentences(stages), *evaluation_gate.sentences(stages)]


def refuse(stages: Sequence[PlannedStage], configs: Mapping[str, StageConfig]) -> None:
    """Refuses results that do not meet the gates of these stages. ``configs`` are all stages of the run. Raises
    GateNotMet: names each gate, what was measured, and the remedies."""
    if sentences := not_met(stages):
        remedies = [*forgetting_gate.remedies(stages, configs), *evaluation_gate.remedies(stages)]
        raise GateNotMet("\n  ".join(sentences), remedy="\n  → ".join(remedies))
