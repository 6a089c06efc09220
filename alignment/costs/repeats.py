"""How often a whole stage does what it does while it is estimated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.optim import OptimConfig

STEP_ROWS = 8
"""Rows of a step that is taken; a larger one repeats what a small one does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How many times as much as the estimated stage the whole one does, unless that ``is_unknown``. ``steps``: of its
    steps, and ``learning`` times as often in the phase that learns. ``rows``: of what it does with each row, and
    ``held_out`` with each that is held out. ``of_steps``: by how much the number of its steps is larger."""

    steps: float = 1.0
    learning: float = 1.0
    rows: float = 1.0
    held_out: float = 1.0
    of_steps: float = 1.0
    is_unknown: bool = False


def repeats_of(config: Any, times: float | None) -> Repeats:
    """For a stage with these settings that was estimated on a part of its rows, of which it reads so many ``times`` as
    many; None if that is not known (data/row_count.py)."""
    rows, is_unknown = (1.0, True) if times is None else (times, False)
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
