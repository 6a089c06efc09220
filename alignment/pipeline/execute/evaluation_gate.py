"""The gates of an evaluation: by how much one arm has to be better than another, with confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.config.evaluating import GateConfig
from alignment.core.artifacts import read_manifest
from alignment.pipeline.execute.paired_differences import difference, scores
from alignment.pipeline.plan.plan import PlannedStage
from alignment.records.evaluation import FEWEST_PROMPTS, Evaluation
from alignment.records.interval import Interval
from alignment.stages.registry import kind_of


def not_met(stages: Sequence[PlannedStage]) -> list[str]:
    """A sentence for each gate that is not met: its arms, the difference with its interval, and what is required."""
    return [sentence for stage in stages for sentence in _of_stage(stage)]


def remedies(stages: Sequence[PlannedStage]) -> list[str]:
    """Where the gates are set that are not met."""
    failed = [stage.name for stage in stages if any(_of_stage(stage))]
    return [f"stages.{name}.gate sets the requirement; more prompts make the intervals narrower" for name in failed]


def _of_stage(stage: PlannedStage) -> Iterator[str]:
    gates = kind_of(stage.config).outcome.gates(stage.config)
    if not gates or read_manifest(stage.artifact) is None:
        return
    try:
        evaluation = Evaluation.read(stage.artifact)
    except FileNotFoundError:
        yield f"stages.{stage.name}.gate: {stage.artifact} has no evaluation.json; delete it to remake it"
        return
    for number, gate in enumerate(gates):
        metric = gate.metric or evaluation.primary or ""
        gain = _gain(stage, evaluation, metric, gate)
        if gain is None or gain.bounds is None or gain.bounds[0] <= gate.min_difference:
            arms = f"{evaluation.label(gate.arm)} against {evaluation.label(gate.against)}"
            yield f"stages.{stage.name}.gate[{number}]: {arms} in {metric}: {_in_words(gain, gate.min_difference)}"


def _gain(stage: PlannedStage, evaluation: Evaluation, metric: str, gate: GateConfig) -> Interval | None:
    """By how much the arm is better, prompt by prompt; None if the samples do not have enough scores of both."""
    arm, against = (scores(stage.artifact, name).get(metric, {}) for name in (gate.arm, gate.against))
    if len(arm) < FEWEST_PROMPTS:
        return None
    more_is_better = next((known.higher_is_better for known in evaluation.metrics if known.name == metric), True)
    return difference(arm, against) if more_is_better else difference(against, arm)


def _in_words(gain: Interval | None, required: float) -> str:
    if gain is None or gain.bounds is None:
        return f"samples.jsonl does not have the scores of both on {FEWEST_PROMPTS} different prompts"
    low, high = gain.bounds
    return f"better by {gain.mean:+.3f} ({low:+.3f} to {high:+.3f}); the whole interval must be above {required:+.3f}"
