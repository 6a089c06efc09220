"""How much data a plan has seen, and stages for which that is too little.

Only the stage knows which rows are too long, so these counts are upper bounds. What they refuse, the stage would
refuse too, but only after the stages before it have trained.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile
from typing import Any

from alignment.config.data import DataConfig
from alignment.config.faults import Fault
from alignment.config.optim import OptimConfig
from alignment.config.stage import StageConfig
from alignment.data.overlap import LocatedText, asked
from alignment.data.records import Conversation, Record
from alignment.pipeline.plan import validation_checks
from alignment.stages.registry import as_trained, kind_of, rows_are_counted

COMPARED_ROWS = 2_000
COMPARED_CHARACTERS = 1_000_000
"""The part of a source that is compared with the evaluation's data, to keep planning fast: this many characters take
about half a second. ``align preview`` compares more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The number of ``rows`` of a source and of different ``prompts`` in them; exact if the ``whole`` source was read.
    ``texts`` are what the first rows ask. ``set_aside`` counts the rows that are of no use to the stage, by reason;
    ``openings`` are hashes of what stands before the first learned answer, ``labels`` the number of rows by label.
    ``answers`` counts the answers that are learned, if conversations have several."""

    rows: int
    prompts: int
    whole: bool
    texts: tuple[LocatedText, ...] = ()
    set_aside: tuple[tuple[str, int], ...] = ()
    openings: frozenset[int] = frozenset()
    labels: tuple[tuple[str, int], ...] = ()
    answers: int = 0


def seen(
    records: Sequence[Record],
    *,
    whole: bool,
    set_aside: Mapping[str, int] | None = None,
    label: Callable[[Record], str] | None = None,
) -> Seen:
    """A summary of the records that a plan has read. ``set_aside`` counts the rows that gave none, by reason. ``label``
    names the label of a record."""
    prompts = {_prompt_of(record) for record in records}
    turns = [record.messages if isinstance(record, Conversation) else () for record in records]
    learned = (sum(turn.role == "assistant" and turn.learned for turn in of_record) for of_record in turns)
    openings = frozenset(hash(_prompt_of(record, opening=True)) for record in records)
    return Seen(
        rows=len(records),
        prompts=len(prompts),
        whole=whole,
        texts=tuple(_compared(records)),
        set_aside=tuple((set_aside or {}).items()),
        openings=openings,
        labels=() if label is None else tuple(sorted(Counter(map(label, records)).items())),
        answers=sum(max(1, number) for number in learned),
    )


def _compared(records: Sequence[Record]) -> Iterator[LocatedText]:
    left = COMPARED_CHARACTERS
    for placed in map(asked, records[:COMPARED_ROWS]):
        left -= len(placed.text)
        if left < 0:
            return
        yield placed


def _prompt_of(record: Any, *, opening: bool = False) -> tuple[Any, ...]:
    """All that a template renders, because a stage distinguishes prompts by their tokens; of a conversation whose
    ``opening`` is asked for, only what stands before the first answer that is learned."""
    messages = getattr(record, "messages", ())
    if opening and isinstance(record, Conversation):
        messages = takewhile(lambda turn: turn.role != "assistant" or not turn.learned, messages)
    turns = [(turn.role, turn.content, _text(turn.tool_calls)) for turn in messages]
    return (_text(getattr(record, "tools", ())), *turns) if turns else (getattr(record, "text", ""),)


def _text(values: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(values), sort_keys=True, default=str) if values else ""


def rows_of(data: DataConfig, own: Seen | None) -> int | None:
    """The most rows that a stage can get from its data; None if that is unknown before it runs."""
    if own is None or not own.whole or data.mix:
        return None
    return math.ceil(Fraction(str(data.fraction)) * own.rows)


def most_rows_of(data: DataConfig, own: Seen | None) -> int | None:
    """Like ``rows_of``, for stages that learn rows of tokens: some chat templates make a row of each learned answer."""
    if own is None or rows_of(data, own) is None:
        return None
    return math.ceil(Fraction(str(data.fraction)) * max(own.rows, own.answers))


def labels_of(data: DataConfig, own: Seen | None) -> dict[str, int]:
    """The number of rows of each label that a stage learns from; empty if that is unknown before it runs."""
    return {} if own is None or data.fraction < 1 or rows_of(data, own) is None else dict(own.labels)


def faults(config: StageConfig, seen_by_field: Mapping[str, Seen], *, where: str) -> Iterator[Fault]:
    """Settings of the stage at ``where`` that need more data than it can have."""
    kind, trained = kind_of(config), as_trained(config)
    if trained is None:
        return
    rows = rows_of(trained.data, seen_by_field.get("data"))
    if rows is not None:
        own = seen_by_field["data"]  # a fraction of rows with one label has no other either
        yield from kind.learning.faults(config, min(rows, own.prompts), dict(own.labels), where)
    if not isinstance(trained.optim, OptimConfig):
        return
    looks = validation_checks.of_stage(config)
    known = _batched_rows(config, seen_by_field)
    if looks is not None and known is not None:
        prompts = min(known, len(seen_by_field["data"].openings))
        yield from validation_checks.row_faults(
            looks, rows=known, prompts=prompts, batch_size=trained.optim.batch_size, where=f"{where}.validation"
        )
        known -= validation_checks.num_held_out(looks, prompts)
    yield from _warm_up_faults(trained.optim, known, where=f"{where}.optim")
    if looks is not None:
        if steps := _steps(trained.optim, known):
            yield from validation_checks.step_faults(looks, steps, f"{where}.validation")
        learned, held_out = (seen_by_field.get(name) for name in ("data", validation_checks.DATA))
        if learned is not None and held_out is not None:
            both = (learned.openings, held_out.openings)
            yield from validation_checks.overlap_faults(trained.data, looks, both, f"{where}.validation")


def _batched_rows(config: StageConfig, seen_by_field: Mapping[str, Seen]) -> int | None:
    """The most rows of tokens that the stage has for its batches and for validation; None if only it will know."""
    trained = as_trained(config)
    if trained is None or not rows_are_counted(config) or getattr(config, "packing", False):
        return None
    return most_rows_of(trained.data, seen_by_field.get("data"))


def expected_steps(config: StageConfig, seen_by_field: Mapping[str, Seen]) -> int | None:
    """The optimiser steps of a stage that learns from rows, or the updates of one that learns from its own answers.
    There are fewer if the stage leaves out rows, and more if the chat template makes a row of each answer. None if the
    stage does not train, or if only it will know."""
    trained = as_trained(config)
    if trained is None:
        return None
    if not isinstance(trained.optim, OptimConfig):
        return getattr(config, "updates", None)
    own = seen_by_field.get("data")
    rows = None if _batched_rows(config, seen_by_field) is None else rows_of(trained.data, own)
    if rows is not None and own is not None:
        prompts = min(rows, len(own.openings))
        rows -= validation_checks.num_held_out(validation_checks.of_stage(config), prompts)
        rows -= round(getattr(config, "eval_fraction", 0.0) * prompts)
    return _steps(trained.optim, rows)


def _steps(optim: OptimConfig, rows: int | None) -> int | None:
    if optim.max_steps or rows is None:
        return optim.max_steps
    return math.ceil(optim.epochs * math.ceil(rows / optim.batch_size))


def _warm_up_faults(optim: OptimConfig, rows: int | None, *, where: str) -> Iterator[Fault]:
    steps, ratio = _steps(optim, rows), optim.warmup_ratio
    if not steps or not _is_all_warm_up(steps, ratio):
        return
    enough = math.ceil(1 / (1 - ratio))
    enough += _is_all_warm_up(enough, ratio)  # rounding
    source, longer = "", f"max_steps={enough}"
    if not optim.max_steps and rows is not None:
        source = f" for {rows} rows in batches of {optim.batch_size}"
        longer = f"epochs={math.ceil(enough / math.ceil(rows / optim.batch_size))}"
    remedy = f"set {where}.warmup_ratio=0, or {where}.{longer} or more"
    message = f"the warm-up covers all optimiser steps ({steps}{source}); {remedy}"
    yield Fault(where=f"{where}.warmup_ratio", message=message)


def _is_all_warm_up(steps: int, ratio: float) -> bool:
    return ratio > 0 and math.ceil(steps * ratio) >= steps
