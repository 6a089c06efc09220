"""How much data there is, as a plan has seen it, and stages that this is too little for.

Rows that are too long are only known to the stage, so what stands here are upper bounds: what they refuse, the stage
would refuse too, after those before it have trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from alignment.config.data import DataConfig
from alignment.config.faults import Fault
from alignment.config.optim import OptimConfig
from alignment.config.stage import CptConfig, PpoConfig, RewardConfig, SftConfig, StageConfig, Trained
from alignment.data.overlap import Placed, asked
from alignment.data.records import Record

COMPARED_ROWS = 2_000
"""Rows of a source that are held against the evaluation's, to keep a plan quick; ``align preview`` looks at more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """``rows`` of a source and how many different ``prompts`` they have; all there are if it was read as a ``whole``.
    ``texts`` are what the first of them ask."""

    rows: int
    prompts: int
    whole: bool
    texts: tuple[Placed, ...] = ()


def seen(records: Sequence[Record], *, whole: bool) -> Seen:
    """What a plan remembers of the records that it read."""
    prompts = {_prompt_of(record) for record in records}
    texts = tuple(asked(record) for record in records[:COMPARED_ROWS])
    return Seen(rows=len(records), prompts=len(prompts), whole=whole, texts=texts)


def _prompt_of(record: Any) -> tuple[Any, ...]:
    """All that a template renders: a stage tells prompts apart by their tokens."""
    turns = [(turn.role, turn.content, _text(turn.tool_calls)) for turn in getattr(record, "messages", ())]
    return (_text(getattr(record, "tools", ())), *turns) if turns else (getattr(record, "text", ""),)


def _text(values: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(values), sort_keys=True, default=str) if values else ""


def rows_of(data: DataConfig, own: Seen | None) -> int | None:
    """Most rows that a stage can have of its data; None if nobody can tell before it runs."""
    if own is None or not own.whole or data.mix:
        return None
    return math.ceil(Fraction(str(data.fraction)) * own.rows)


def faults(config: StageConfig, seen_by_field: Mapping[str, Seen], *, where: str) -> Iterator[Fault]:
    """What a stage at ``where`` asks of its data that cannot be there."""
    if not isinstance(config, Trained) or isinstance(config, CptConfig):
        return  # how many rows a text makes, only its tokens tell
    rows = rows_of(config.data, seen_by_field.get("data"))
    if rows is None:
        return
    prompts = min(rows, seen_by_field["data"].prompts)
    if isinstance(config, PpoConfig):
        if config.guard.every and config.guard.prompts >= prompts:
            message = (
                f"{config.guard.prompts} prompts cannot be held out of {prompts}; choose fewer, or set guard.every to 0"
            )
            yield Fault(where=f"{where}.guard.prompts", message=message)
        return
    held_out = round(config.eval_fraction * prompts) if isinstance(config, RewardConfig) else 0
    if isinstance(config, RewardConfig) and config.eval_fraction > 0 and not 0 < held_out < prompts:
        message = (
            f"{prompts} prompts are too few to hold out a share of {config.eval_fraction:g}; add pairs, or set "
            "eval_fraction to 0"
        )
        yield Fault(where=f"{where}.eval_fraction", message=message)
    if not (isinstance(config, SftConfig) and config.packing):
        yield from _warm_up_faults(config.optim, rows, where=f"{where}.optim")


def _warm_up_faults(optim: OptimConfig, rows: int, *, where: str) -> Iterator[Fault]:
    steps = optim.max_steps or math.ceil(optim.epochs * math.ceil(rows / optim.batch_size))
    if optim.warmup_ratio and math.ceil(steps * optim.warmup_ratio) >= steps:
        message = (
            f"the warm-up takes all optimiser steps, {steps} with {rows} rows in batches of {optim.batch_size}; set it "
            "to 0, or take smaller batches, more rows or more epochs"
        )
        yield Fault(where=f"{where}.warmup_ratio", message=message)
