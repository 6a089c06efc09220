"""Two evaluations on the same prompts: differences prompt by prompt, which say more than two intervals do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.evaluation.bootstrap import Interval, mean_interval
from alignment.pipeline.record import read_record

SAMPLES = 2000
SEED = 0


def evaluations(run_folder: Path) -> dict[str, Path]:
    """The artifacts of a run's evaluations that are done, by stage.

    Raises:
        ArtifactError: there is no such run.
    """
    stages = read_record(run_folder)["stages"]
    found = {name: Path(stage["artifact"]) for name, stage in stages.items() if stage["kind"] == "evaluate"}
    return {name: artifact for name, artifact in found.items() if (artifact / "evaluation.json").is_file()}


def gold(artifact: Path, arm: str) -> dict[str, float]:
    """The gold of an arm's answers, by prompt."""
    lines = (artifact / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {str(row["id"]): float(row["answers"][arm]["gold"]) for row in rows if arm in row["answers"]}


def difference(one: dict[str, float], other: dict[str, float]) -> Interval | None:
    """``one`` less ``other`` over prompts, with its 95 % interval; None where they are not about the same prompts."""
    if not one or one.keys() != other.keys():
        return None
    return mean_interval([one[prompt] - other[prompt] for prompt in one], samples=SAMPLES, seed=SEED)
