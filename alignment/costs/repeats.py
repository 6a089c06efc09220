"""How often a whole stage does what it does while it is estimated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.data import DataConfig
from alignment.config.optim import OptimConfig

STEP_ROWS = 8
"""Rows of a step that is taken; a larger one repeats what a small one does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How many times as much as the estimated stage the whole one does, unless that ``is_unknown``.

    ``steps``: of its steps, and ``learning`` times as often in the phase that learns. ``rows``: of what it does with
    each row, and ``held_out`` with each that is held out. ``of_steps``: by how much the number of its steps is larger.
    """

    steps: float = 1.0
    learning: float = 1.0
    rows: float = 1.0
    held_out: float = 1.0
    of_steps: float = 1.0
    is_unknown: bool = False


def repeats_of(config: Any, data_path: Path, rows_read: int) -> Repeats:
    """For a stage with these settings, of whose data so many rows were read."""
    data = getattr(config, "data", None)
    counted = _share_unread(data_path, data, rows_read) if isinstance(data, DataConfig) else 1.0
    rows, is_unknown = (1.0, True) if counted is None else (counted, False)
    optim = getattr(config, "optim", None)
    if not isinstance(optim, OptimConfig):
        epochs = float(getattr(config, "ppo_epochs", 1))
        without = optim is None  # it does the same with every row
        return Repeats(
            learning=epochs, rows=rows if without else 1.0, of_steps=epochs, is_unknown=without and is_unknown
        )
    larger = optim.batch_size / min(optim.batch_size, STEP_ROWS)
    validation = getattr(config, "validation", None)
    held_out = rows if validation is not None and validation.share is not None else 1.0  # a part of the rows
    if optim.max_steps is not None:
        return Repeats(steps=larger, rows=rows, held_out=held_out)
    return Repeats(steps=rows, rows=rows, held_out=held_out, of_steps=rows / larger, is_unknown=is_unknown)


def _share_unread(file: Path, data: DataConfig, rows: int) -> float | None:
    """How many times as many rows as are read here the stage reads; None if that would need reading them all."""
    if data.limit is not None and data.limit <= rows:
        return 1.0
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    with file.open("rb") as lines:
        number = sum(1 for _ in lines)
    return max(1.0, min(number, data.limit or number) / rows)
