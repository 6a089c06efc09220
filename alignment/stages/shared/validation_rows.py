"""The rows by which a stage is validated while it trains: a share of its own prompts, or a source of their own."""

from __future__ import annotations

import json
from typing import Any, Protocol

from datasets import Dataset

from alignment.config.optim import OptimConfig
from alignment.config.validation import ValidationConfig
from alignment.core.errors import DataError
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import Kind
from alignment.stages.shared.by_prompt import distinguishing_prompts, split_by_prompt
from alignment.stages.shared.stage_rows import WHERE, token_rows
from alignment.training.context import StageContext

HELD_OUT = "validation_rows.jsonl"
"""Names the rows that were held out, next to the result."""


class ValidatedConfig(Protocol):
    """Settings of a stage that can be validated while it trains."""

    optim: OptimConfig
    validation: ValidationConfig


def hold_out(
    config: ValidatedConfig,
    context: StageContext,
    rows: Dataset,
    kind: Kind,
    limits: Limits,
    tokenizer: Any,
    *,
    reported: Dataset | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The rows to learn from, and the held-out rows, which are None without validation.

    No prompt is on both sides, and none of a held-out row is in ``reported``, the rows on which the stage reports its
    result. ``rows`` have the column ``where``, and so have those to learn from. Held-out ones have the kind's columns
    alone; those of a ``share`` are listed in ``HELD_OUT``.

    Raises:
        DataError: too few prompts to hold any out, less than one batch is left to learn from, or a prompt of the
            validation's own data is learned from or reported on.
    """
    validation, where = config.validation, f"stages.{context.spec.stage}.validation"
    if not validation.on:
        return rows, None
    if validation.share is None:
        held_out, _ = token_rows(context, kind, validation.data, limits, tokenizer, field="validation.data")
        why = "that is also trained on, so their loss says nothing about new prompts"
        _refuse_shared_prompts(rows, held_out, why, where=f"{where}.data")
        if reported is not None:
            why = "on which the stage reports its result, and validation must not use these"
            _refuse_shared_prompts(reported, held_out, why, where=f"{where}.data")
        return rows, held_out.select_columns(list(kind.all_columns))
    learned, chosen = split_by_prompt(
        rows,
        validation.share,
        context.generator("validation"),
        where=f"{where}.share",
        setting="validation.data to separate rows",
    )
    if len(learned) < config.optim.batch_size:
        raise DataError(
            f"{validation.share} of the prompts leaves {len(learned)} rows to learn from, less than one batch of "
            f"{config.optim.batch_size}",
            where=f"{where}.share",
            remedy="choose a smaller share or smaller batches, or add rows",
        )
    held_out = rows.select(chosen, keep_in_memory=True)
    _list(context, held_out[WHERE])
    return rows.select(learned, keep_in_memory=True), held_out.select_columns(list(kind.all_columns))


def _refuse_shared_prompts(rows: Dataset, held_out: Dataset, why: str, *, where: str) -> None:
    asked = set(distinguishing_prompts(rows))
    shared = sum(prompt in asked for prompt in distinguishing_prompts(held_out))
    if shared:
        raise DataError(
            f"{shared} of {len(held_out)} held-out rows have a prompt {why}",
            where=where,
            remedy="remove these rows from one of the two sources, or use validation.share",
        )


def _list(context: StageContext, located: list[str]) -> None:
    if context.is_main:
        lines = (json.dumps({WHERE: name}, ensure_ascii=False) + "\n" for name in located)
        (context.content / HELD_OUT).write_text("".join(lines), encoding="utf-8")
