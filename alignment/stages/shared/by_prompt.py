"""Splits token rows by their prompts, so that no prompt is on both sides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset

from alignment.core.errors import DataError
from alignment.data.tokens.row_kinds import PROMPT
from alignment.models.forward.causal import IGNORED
from alignment.stages.shared.preference_pairs import rows_of
from alignment.stages.shared.stage_rows import WHERE


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

    Raises:
        DataError: there are too few prompts to hold any out; the error names the ``setting``.
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
