"""A stage that over-fits, so that its held-out loss falls and then rises: a few rows whose answers are noise."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.optim import Schedule
from alignment.job import StageSpec
from alignment.training.context import StageContext
from tests.chained import Chained, config_of

ROWS = 17
HELD_OUT = ValidationConfig(share=0.3, every=2, keep_best=True)
"""Five of 17 prompts: a number that two processes cannot share evenly."""
STEPS = {"sft": 16, "reward": 10, "dpo": 10}
RATES = {"sft": 1e-2, "reward": 1e-2, "dpo": 3e-3}


def noise(kind: str, *, rows: int = ROWS, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a kind of stage that ask for different words, from ``first`` on, and answer with random letters."""
    rng = random.Random(1 + first)

    def word() -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(4, 12)))

    asked = [[{"role": "user", "content": f"Word {number}?"}] for number in range(first, first + rows)]
    if kind == "sft":
        return [{"messages": [*turns, {"role": "assistant", "content": word()}]} for turns in asked]
    return [{"messages": turns, "chosen": word(), "rejected": word()} for turns in asked]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file in JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overfitting(
    chained: Chained,
    kind: str,
    adapter: AdapterConfig,
    validation: ValidationConfig = HELD_OUT,
    *,
    max_steps: int | None = None,
    rate: float | None = None,
    rows: int = ROWS,
    **changes: Any,
) -> StageSpec:
    """The stage in the folder of ``chained``, in which it has not run yet; ``changes`` are those of its settings."""
    config: Any = config_of(kind, adapter)
    optim = replace(
        config.optim,
        lr=rate or RATES[kind],
        schedule=Schedule.constant,
        max_steps=max_steps or STEPS[kind],
    )
    config = replace(config, data=DataConfig(), optim=optim, validation=validation, **{"save_every": 3, **changes})
    path = write_rows(chained.folder / f"{kind}.jsonl", noise(kind, rows=rows))
    return replace(chained.spec(kind, adapter, config=config), data_path=path)


def ran(spec: StageSpec) -> list[dict[str, float]]:
    """The lines of its metrics, after it has run in this process."""
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return lines(spec)


def lines(spec: StageSpec) -> list[dict[str, float]]:
    """The lines of its metrics."""
    return [json.loads(line) for line in (spec.artifact / "metrics.jsonl").read_text().splitlines()]


def manifest(spec: StageSpec) -> dict[str, float]:
    """The metrics of its manifest."""
    metrics: dict[str, float] = json.loads((spec.artifact / "manifest.json").read_text())["metrics"]
    return metrics


def held_out_losses(rows: list[dict[str, float]]) -> dict[int, float]:
    """The held-out loss by the step of the look."""
    return {int(row["step"]): row["validation/loss"] for row in rows if "validation/loss" in row}
