"""The gates of a run's evaluations, judged again from their files as the run judges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.config.evaluating import GateConfig
from alignment.core.errors import ArtifactError
from alignment.evaluation.gate_outcomes import outcomes
from alignment.records.evaluation import FILE
from alignment.report.kit import text
from alignment.report.run_page.evaluation_section import read_evaluation
from alignment.report.run_page.run_records import Gate, Stage


def read_gates(stage: Stage, folder: Path | None) -> list[Gate]:
    """The gates of a stage that has a result; those that cannot be read are left out."""
    gates = _gates(stage.config)
    if not gates or folder is None or not (folder / FILE).is_file():
        return []
    evaluation, _ = read_evaluation(folder / FILE)
    if evaluation is None:
        return []
    try:
        judged = outcomes(gates, evaluation, folder)
    except (ArtifactError, OSError, ValueError):  # the page says that the samples cannot be read
        return []
    return [Gate(met=outcome.met, sentence=text.prose(outcome.in_words())) for outcome in judged]


def _gates(settings: Mapping[str, Any]) -> list[GateConfig]:
    return list(_readable(settings.get("gate")))


def _readable(listed: Any) -> Iterator[GateConfig]:
    for gate in listed if isinstance(listed, list) else ():
        if not isinstance(gate, Mapping):
            continue
        arm, against, metric = (gate.get(name) for name in ("arm", "against", "metric"))
        required = text.finite(gate.get("min_difference"))
        if isinstance(arm, str) and isinstance(against, str) and required is not None:
            name = metric if isinstance(metric, str) else None
            yield GateConfig(arm=arm, against=against, metric=name, min_difference=required)
