"""Preference pairs, rows grouped by prompt, and the rows of validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.optim import OptimConfig
from alignment.core.errors import DataError
from alignment.data.tokens.row_kinds import PROMPT, Kind, Limits
from alignment.models.forward.causal import IGNORED
from alignment.stages.shared.kind_answers import LimitedConfig, limits_of_parts, pair_rows
from alignment.stages.shared.stage_rows import WHERE, token_rows
from alignment.training.context import StageContext

BLOCK = 1000
"""How many rows a pass over all of them loads at a time."""


class PairsConfig(LimitedConfig, Protocol):
    """Settings of a stage that learns from pairs."""

    data: DataConfig
    margin: float


def read_pairs(config: PairsConfig, context: StageContext, tokenizer: Any) -> tuple[Dataset, dict[str, float]]:
    """The pairs within the limits, with the column ``where``, and how many there are, were too long or were cut.

    With a ``margin``, they have that column too.
    """
    kind, limits = pair_rows(config.margin), limits_of_parts(config)
    return token_rows(context, kind, config.data, limits, tokenizer)


def rows_of(pairs: Dataset, *columns: str) -> Iterator[tuple[list[int], ...]]:
    """The token ids of each pair in these columns, from the first pair to the last."""
    for block in pairs.select_columns(list(columns)).iter(BLOCK):
        yield from zip(*(block[column] for column in columns), strict=True)


def pair_tokens(pairs: Dataset) -> list[int]:
    """``[pairs]``: the tokens of both rows of each pair."""
    return [
        2 * len(prompt) + len(chosen) + len(rejected)
        for prompt, chosen, rejected in rows_of(pairs, "prompt", "chosen", "rejected")
    ]


def prompts_of(rows: Dataset) -> list[bytes]:
    """The prompt of each row, as bytes that sort like the lists of its tokens.

    In a row of ``input_ids`` and ``labels`` it is everything before the first learned token. A row that is learned from
    its first token on has no prompt, and is taken as a whole.
    """
    if PROMPT in rows.column_names:
        return [_in_order(prompt) for (prompt,) in rows_of(rows, PROMPT)]
    return [_in_order(prompt) for prompt in _unlearned_starts(rows)]


def _unlearned_starts(rows: Dataset) -> Iterator[list[int]]:
    for ids, labels in rows_of(rows, "input_ids", "labels"):
        learned = next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
        yield ids[:learned] or ids


def split_by_prompt(
    rows: Dataset, share: float, rng: torch.Generator, *, where: str, setting: str
) -> tuple[list[int], list[int]]:
    """The indices of rows to learn from, and of the rows of a share of the prompts.

    Rows of one conversation stay together, by the first one's prompt: a later one contains what an earlier one learns.
    """
    prompt_of = _by_record(rows, prompts_of(rows))
    prompts = sorted(set(prompt_of))
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        raise DataError(
            f"{len(prompts)} prompts are too few to hold out a share of {share}",
            where=where,
            remedy=f"add rows, or set {setting}",
        )
    chosen = {prompts[i] for i in torch.randperm(len(prompts), generator=rng)[:count].tolist()}
    learned = [row for row, prompt in enumerate(prompt_of) if prompt not in chosen]
    held_out = [row for row, prompt in enumerate(prompt_of) if prompt in chosen]
    return learned, held_out


def distinguishing_prompts(rows: Dataset) -> list[bytes]:
    """What tells rows apart: the prompt of each, or for a row without one that of the first row from the same record.

    The end of a long text has no prompt, and may be a single token that ends other texts too.
    """
    prompts = prompts_of(rows)
    if PROMPT in rows.column_names:
        return prompts
    learned_at_once = (labels[0] != IGNORED for (labels,) in rows_of(rows, "labels"))
    first = _by_record(rows, prompts)
    return [first[row] if whole else prompts[row] for row, whole in enumerate(learned_at_once)]


def _by_record(rows: Dataset, prompts: list[bytes]) -> list[bytes]:
    """For each row the prompt of the first row from the same record, if rows say where they are from."""
    if WHERE not in rows.column_names:
        return prompts
    first: dict[str, bytes] = {}
    return [first.setdefault(where, prompt) for where, prompt in zip(rows[WHERE], prompts, strict=True)]


def _in_order(ids: list[int]) -> bytes:
    """Token ids as compact bytes that sort like the lists."""
    return np.asarray(ids, dtype=">u4").tobytes()


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
