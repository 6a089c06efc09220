"""How many tokens a trainer's rows have, and a check before the first step that its model can read them all.

Without it, a row that is longer than the model's positions would stop a training in the step that meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel

from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.answers import unwrapped

BLOCK = 10_000
"""How many packed rows are read at a time."""
_PACKED = "seq_lengths"
"""TRL's column of the lengths of the rows that were packed into one."""
_NOT_TOKENS = {"labels", "position_ids", _PACKED, "attention_mask", "completion_mask"}
"""Columns of a row that are as long as its tokens, or no tokens."""
_WITHOUT_GRADIENTS = "KL_"
"""TRL's prefix for columns of other answers, which are read in a pass of their own."""
_PROMPT = "prompt"
"""TRL's prefix for columns of prompts."""


def row_tokens(rows: Dataset, *, prompts_twice: bool = False) -> NDArray[np.int64]:
    """``[rows]``: the tokens of each row in all its columns; both answers of a pair, and their prompt once or twice."""

    def summed(lengths: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
        times = {name: 2 if prompts_twice and name.startswith(_PROMPT) else 1 for name in lengths}
        return np.sum([times[name] * of_column for name, of_column in lengths.items()], axis=0, dtype=np.int64)

    columns = [name for name in _columns(rows) if not name.startswith(_WITHOUT_GRADIENTS)]
    return _measured(rows, columns, summed)


def longest_sequences(rows: Dataset) -> NDArray[np.int64]:
    """``[rows]``: the tokens of the longest sequence that the model reads of each row: its prompt with an answer, or
    the longest of the rows that were packed into it."""
    if _PACKED in rows.column_names:
        blocks = rows.select_columns([_PACKED]).iter(BLOCK)
        return np.array([max(lengths) for block in blocks for lengths in block[_PACKED]])

    def with_longest_answer(lengths: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
        prompts = [of_column for name, of_column in lengths.items() if name.startswith(_PROMPT)]
        others = [of_column for name, of_column in lengths.items() if not name.startswith(_PROMPT)]
        return np.sum([*prompts, np.max(others, axis=0)], axis=0, dtype=np.int64)

    return _measured(rows, _columns(rows), with_longest_answer)


def refuse_long_rows(model: PreTrainedModel, rows: Dataset, origin: Callable[[int], str]) -> None:
    """Checks that the model can read every row; ``origin`` says where a row is from, by its number.

    Raises:
        ModelError: a row is longer than the model's positions; the error names the longest.
    """
    tokens = longest_sequences(rows)
    longest = int(tokens.argmax())
    refuse_too_long(unwrapped(model).base_model, int(tokens[longest]), where=origin(longest))


def _columns(rows: Dataset) -> list[str]:
    """The columns of token ids."""
    return [
        field.name
        for field in rows.features.arrow_schema
        if (pa.types.is_list(field.type) or pa.types.is_large_list(field.type)) and field.name not in _NOT_TOKENS
    ]


def _measured(
    rows: Dataset, columns: Sequence[str], measure: Callable[[Mapping[str, NDArray[np.int64]]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """``[rows]``: what ``measure`` makes of the lengths of these columns, by their names.

    Lengths are read of all rows of the table in their order, because to gather selected rows takes a hundred times as
    long.
    """
    table = rows.data.table
    every = measure({name: pc.list_value_length(table[name]).to_numpy() for name in columns})
    return every if rows._indices is None else every[rows._indices.column(0).to_numpy()]
