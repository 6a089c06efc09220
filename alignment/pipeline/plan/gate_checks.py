"""The gates of evaluations while planning: what each requires, and those that no result could meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from alignment.config.data import DataConfig
from alignment.config.evaluating import GateConfig
from alignment.config.faults import Fault
from alignment.config.scoring import MetricConfig
from alignment.config.stage import StageConfig
from alignment.evaluation.paired_scores import above, compared, labels
from alignment.pipeline.plan.row_counts import Seen, rows_of
from alignment.records.evaluation import FEWEST_PROMPTS
from alignment.stages.registry import gates_of, kind_of


def in_words(config: StageConfig) -> list[str]:
    """What each gate of a stage requires; each is the end of a sentence that begins with the stage's name."""
    return [_in_words(config, gate) for gate in gates_of(config)]


def faults(config: StageConfig, seen_by_field: Mapping[str, Seen], *, where: str) -> Iterator[Fault]:
    """A fault if the stage at ``where`` has gates and fewer held-out prompts than they need."""
    data, seen = getattr(config, "data", None), seen_by_field.get("data")
    if seen is None or not isinstance(data, DataConfig) or not gates_of(config):
        return
    rows = rows_of(data, seen)
    if rows is not None and (prompts := min(rows, seen.prompts)) < FEWEST_PROMPTS:
        needed = f"a gate needs at least {FEWEST_PROMPTS} different held-out prompts"
        message = f"{needed}, and {where}.data has {prompts}; add prompts, or remove the gate"
        yield Fault(where=f"{where}.gate", message=message)


def _in_words(config: StageConfig, gate: GateConfig) -> str:
    kind = kind_of(config)
    scorers = [scorer for scorer in kind.scorers(config).values() if isinstance(scorer, MetricConfig)]
    metric = next((scorer for scorer in scorers if scorer.name == gate.metric), kind.display.primary(config))
    label = labels(getattr(config, "arms", (gate.arm, gate.against)))
    name, higher_is_better = ("", True) if metric is None else (metric.name, metric.higher_is_better)
    difference = compared(label[gate.arm], label[gate.against], name, higher_is_better=higher_is_better)
    return f"requires {difference}: {above(gate.min_difference)}"
