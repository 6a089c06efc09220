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

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.evaluating import GateConfig
from alignment.config.faults import Fault
from alignment.config.optim import OptimConfig
from alignment.config.scoring import MetricConfig
from alignment.config.stage import StageConfig
from alignment.data.overlap import LocatedText, asked
from alignment.data.records import Conversation, Record
from alignment.evaluation.paired_scores import above, compared, labels
from alignment.records.evaluation import FEWEST_PROMPTS
from alignment.stages.registry import as_trained, gates_of, kind_of, rows_are_counted

VALIDATION_DATA = "validation.data"
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
    validation = validation_of(config)
    known = _batched_rows(config, seen_by_field)
    if validation is not None and known is not None:
        prompts = min(known, len(seen_by_field["data"].openings))
        batch_size = trained.optim.batch_size
        yield from _share_faults(validation, known, prompts, batch_size, where=f"{where}.validation")
        known -= _num_held_out(validation, prompts)
    yield from _warm_up_faults(trained.optim, known, where=f"{where}.optim")
    if validation is not None:
        if steps := _steps(trained.optim, known):
            yield from _step_faults(validation, steps, f"{where}.validation")
        learned, held_out = (seen_by_field.get(name) for name in ("data", VALIDATION_DATA))
        # If only a part of a source is used, only the stage knows which rows are in it.
        all_used = trained.data.fraction == validation.data.fraction == 1.0
        if learned and held_out and all_used and (shared := len(learned.openings & held_out.openings)):
            both = f"{shared} of its {len(held_out.openings)} different prompts are also training prompts"
            message = f"{both}, so their loss says little; remove them from one source, or use validation.share"
            yield Fault(where=f"{where}.validation.data.source", message=message)


def validation_of(config: StageConfig) -> ValidationConfig | None:
    """The validation of a stage, if its kind has such settings and they are used."""
    validation = getattr(config, "validation", None)
    return validation if isinstance(validation, ValidationConfig) and validation.on else None


def _step_faults(validation: ValidationConfig, steps: int, where: str) -> Iterator[Fault]:
    if validation.every > steps:
        message = f"{validation.every} is more than the {steps} optimiser steps of the stage; choose at most {steps}"
        yield Fault(where=f"{where}.every", message=message)
        return
    validations = math.ceil(steps / validation.every)
    if validation.patience is not None and validation.patience >= validations:
        plural = "" if validations == 1 else "s"
        of_all = f"of {validations} validation{plural}, at most {validations - 1} can follow the best one"
        message = f"{validation.patience} has no effect: {of_all}; choose less, or validate more often"
        yield Fault(where=f"{where}.patience", message=message)


def _num_held_out(validation: ValidationConfig | None, prompts: int) -> int:
    """How many of so many prompts are held out; each has one row or more."""
    return 0 if validation is None or validation.share is None else round(validation.share * prompts)


def _share_faults(
    validation: ValidationConfig, rows: int, prompts: int, batch_size: int, *, where: str
) -> Iterator[Fault]:
    held_out = _num_held_out(validation, prompts)
    if validation.share is None:
        return
    if not 0 < held_out < prompts:
        too_few = f"{prompts} prompts are too few to hold out a share of {validation.share:g}"
        message = f"{too_few}; choose another share, add rows, or name separate rows in {where}.data"
        yield Fault(where=f"{where}.share", message=message)
    elif rows - held_out < batch_size:
        leaves = f"{validation.share:g} leaves at most {rows - held_out} of {rows} rows to learn from"
        message = f"{leaves}, less than a batch of {batch_size}; choose a smaller share or batch, or add rows"
        yield Fault(where=f"{where}.share", message=message)


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
        rows -= _num_held_out(validation_of(config), prompts)
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


def gates_in_words(config: StageConfig) -> list[str]:
    """What each gate of a stage requires; each is the end of a sentence that begins with the stage's name."""
    return [_gate_in_words(config, gate) for gate in gates_of(config)]


def _gate_in_words(config: StageConfig, gate: GateConfig) -> str:
    kind = kind_of(config)
    scorers = [scorer for scorer in kind.scorers(config).values() if isinstance(scorer, MetricConfig)]
    metric = next((scorer for scorer in scorers if scorer.name == gate.metric), kind.display.primary(config))
    label = labels(getattr(config, "arms", (gate.arm, gate.against)))
    name, higher_is_better = ("", True) if metric is None else (metric.name, metric.higher_is_better)
    difference = compared(label[gate.arm], label[gate.against], name, higher_is_better=higher_is_better)
    return f"requires {difference}: {above(gate.min_difference)}"


def gate_faults(config: StageConfig, seen_by_field: Mapping[str, Seen], *, where: str) -> Iterator[Fault]:
    """A fault if the stage at ``where`` has gates and fewer held-out prompts than they need."""
    data, seen = getattr(config, "data", None), seen_by_field.get("data")
    if seen is None or not isinstance(data, DataConfig) or not gates_of(config):
        return
    rows = rows_of(data, seen)
    if rows is not None and (prompts := min(rows, seen.prompts)) < FEWEST_PROMPTS:
        needed = f"a gate needs at least {FEWEST_PROMPTS} different held-out prompts"
        message = f"{needed}, and {where}.data has {prompts}; add prompts, or remove the gate"
        yield Fault(where=f"{where}.gate", message=message)
