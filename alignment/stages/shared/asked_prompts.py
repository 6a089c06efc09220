"""The prompts that a stage asks: each once, and none that an evaluation asks too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignment.config.data import DataConfig
from alignment.config.too_long import TooLongConfig
from alignment.core.errors import DataError
from alignment.data.overlap import HeldOut, asked
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import PROMPTS
from alignment.stages.shared.stage_rows import fitting, list_left_out, rows_of
from alignment.training.context import StageContext


class AskingConfig(Protocol):
    """Settings of a stage that asks a policy the prompts of its data."""

    data: DataConfig
    leave_out: list[DataConfig]
    max_prompt_length: int
    too_long: TooLongConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedPrompts:
    """Indices of prompts in the stage's data (``rows``), and their token ``ids``; and how many were left out."""

    rows: Sequence[int]
    ids: Sequence[Sequence[int]]
    too_long: int
    evaluated: int
    repeated: int


def asked_prompts(
    config: AskingConfig, context: StageContext, tokenizer: Any, records: Sequence[Prompt]
) -> AskedPrompts:
    """The prompts of ``records`` that are asked; ``left_out.jsonl`` lists the others.

    Raises:
        DataError: a row cannot be rendered, too many are too long, or no prompt is left.
    """
    limits = Limits(row=config.max_prompt_length, too_long=config.too_long)
    by_row, counts = fitting(context, PROMPTS, records, config.data, limits, tokenizer)
    ids = {row: tokenized.rows[0]["prompt"] for row, tokenized in by_row.items()}
    evaluated = _evaluated(config, context, {row: records[row] for row in ids})
    repeated = set(_repeated({row: prompt for row, prompt in ids.items() if row not in evaluated}))
    reasons = {**evaluated, **dict.fromkeys(repeated, "its prompt repeats an earlier row")}
    list_left_out(context, ({"where": records[row].where, "reason": reasons[row]} for row in sorted(reasons)))
    rows = [row for row in ids if row not in reasons]
    if not rows:
        raise DataError(
            f"no prompt is left of {len(records)}: {len(evaluated)} are also evaluated, {len(repeated)} are repeated",
            where=f"stages.{context.spec.stage}.data",
            remedy="use prompts that no evaluation of the run uses",
        )
    return AskedPrompts(
        rows=rows,
        ids=[ids[row] for row in rows],
        too_long=int(counts["rows_too_long"]),
        evaluated=len(evaluated),
        repeated=len(repeated),
    )


def _evaluated(config: AskingConfig, context: StageContext, records: Mapping[int, Prompt]) -> dict[int, str]:
    """The rows that ask what an evaluation asks, with the reason."""
    held_out = HeldOut(
        asked(prompt)
        for number, data in enumerate(config.leave_out)
        for prompt in rows_of(context, HeldOutPrompt, data, field=f"leave_out[{number}]")
    )
    reasons = {}
    for row, record in records.items():
        for overlap in held_out.overlaps([asked(record)]):
            reasons[row] = f"it has {overlap.share:.0%} of the eight-word sequences of {overlap.held_out}"
    return reasons


def _repeated(prompts: Mapping[int, Sequence[int]]) -> Iterator[int]:
    """The rows whose prompt is that of an earlier row."""
    seen = set()
    for row, prompt in prompts.items():
        if tuple(prompt) in seen:
            yield row
        seen.add(tuple(prompt))
