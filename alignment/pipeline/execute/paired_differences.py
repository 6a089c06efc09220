"""Two evaluations on the same prompts: differences prompt by prompt, which say more than two intervals do."""

from __future__ import annotations

import json
from pathlib import Path

from alignment.evaluation.bootstrap import mean_interval
from alignment.pipeline.execute.record import read_record
from alignment.records.interval import Interval

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


def scores(artifact: Path, arm: str) -> dict[str, dict[str, float]]:
    """Every figure of an arm's answers (gold and its parts, or whatever else was judged), by prompt.

    A prompt is its id and its turns: rows may have no id, and files may count theirs alike.
    """
    file = artifact / "samples.jsonl"
    # Not by splitlines(), which also splits at U+2028 and the like: answers hold those as they are.
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    found: dict[str, dict[str, float]] = {}
    for row in map(json.loads, filter(None, lines)):
        prompt = json.dumps([row.get("id"), row.get("messages")], sort_keys=True)
        for figure, value in row["answers"].get(arm, {}).items():
            if isinstance(value, (int, float)):
                found.setdefault(figure, {})[prompt] = float(value)
    return found


def gold(artifact: Path, arm: str) -> dict[str, float]:
    """The gold of an arm's answers, by prompt."""
    return scores(artifact, arm).get("gold", {})


def difference(one: dict[str, float], other: dict[str, float]) -> Interval | None:
    """``one`` less ``other`` over prompts, with its 95 % interval; None where they are not about the same prompts."""
    if not one or one.keys() != other.keys():
        return None
    return mean_interval([one[prompt] - other[prompt] for prompt in one], samples=SAMPLES, seed=SEED)
