"""Labelled answers in the order in which a stage learns from them, each beside an answer to another prompt.

The KL divergence in the loss is estimated from such mismatched answers, which are those of the same batch (Ethayarajh
et al. 2024, section 4.1). So rows are shuffled once, and batches are runs of consecutive rows. These are batches of all
processes together: then neither their number nor a restart changes which answers meet.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray

from alignment.data.tokens.row_kinds import DESIRABLE, PROMPT, UNDESIRABLE
from alignment.stages.shared.preference_pairs import prompts_of
from alignment.stages.shared.stage_rows import WHERE

ANSWER, MISMATCHED, LABEL = "completion", "KL_completion", "label"
"""Columns: the answer to the prompt, an answer to another prompt, and whether the first is desirable."""


def count_labels(rows: Dataset) -> dict[str, int]:
    """The number of rows of each label, in rows of ``LABELLED_ANSWERS``."""
    desirable = int(pc.sum(_is_desirable(_table(rows))).as_py() or 0)
    return {DESIRABLE: desirable, UNDESIRABLE: len(rows) - desirable}


def in_order(rows: Dataset, rng: torch.Generator, *, batch_size: int, max_length: int, mismatch: bool) -> Dataset:
    """Rows of ``LABELLED_ANSWERS``, shuffled, with the columns ``prompt``, ``completion``, ``label`` and ``where``.

    ``mismatch`` adds the column ``KL_completion``: the answer of another row of the same batch of ``batch_size`` rows,
    cut so that it has at most ``max_length`` tokens with the prompt.
    """
    order = pa.array(torch.randperm(len(rows), generator=rng).numpy())
    table = _table(rows).take(order)
    label = _is_desirable(table)
    columns = {
        PROMPT: table[PROMPT],
        ANSWER: pc.if_else(label, table[DESIRABLE], table[UNDESIRABLE]),
        LABEL: label,
        WHERE: table[WHERE],
    }
    shuffled = Dataset(pa.table(columns), fingerprint=f"{rng.initial_seed():016x}")  # else all rows would be hashed
    if not mismatch:
        return shuffled
    others = pa.array(mismatched(prompts_of(shuffled), batch_size))
    room = np.maximum(0, max_length - pc.list_value_length(columns[PROMPT]).to_numpy())
    table = pa.table({**columns, MISMATCHED: _cut(columns[ANSWER].take(others), room)})
    return Dataset(table, fingerprint=shuffled._fingerprint)


def mismatched(prompts: Sequence[Hashable], batch_size: int) -> list[int]:
    """``[rows]``: for each row, the row whose answer is put beside its prompt.

    Within a batch, each prompt gets the answer of the row before it, and the first the last one's. If several rows have
    one prompt, the distance is the least at which fewest prompts get an answer to themselves. A batch of a single row,
    the last, gets the answer of the row before it. Example: prompts ``a b c d e`` in batches of 3 give ``2 0 1 4 3``.
    """
    others: list[int] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        distance = _distance(batch)
        others += [start + (row - distance) % len(batch) for row in range(len(batch))]
    if len(prompts) > 1 and len(prompts) % batch_size == 1:
        others[-1] -= 1
    return others


def _distance(batch: Sequence[Hashable]) -> int:
    fewest, best = len(batch) + 1, 1
    for distance in range(1, len(batch)):
        own = sum(batch[row] == batch[row - distance] for row in range(len(batch)))
        if own < fewest:
            fewest, best = own, distance
        if not fewest:
            break
    return best


def _cut(answers: pa.ChunkedArray, room: NDArray[np.int64]) -> pa.ChunkedArray | pa.Array:
    """``[rows]``: the first tokens of each answer, at most ``[rows]`` so many."""
    lengths = pc.list_value_length(answers).to_numpy()
    if (lengths <= room).all():
        return answers
    cut = np.minimum(lengths, room)
    token = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)  # its number in its answer
    ids = pc.list_flatten(answers).filter(pa.array(token < np.repeat(cut, lengths)))
    return pa.ListArray.from_arrays(np.append(0, cut.cumsum()), ids.combine_chunks()).cast(answers.type)


def _table(rows: Dataset) -> pa.Table:
    return rows.with_format("arrow")[:]


def _is_desirable(table: pa.Table) -> pa.ChunkedArray:
    """``[rows]``: whether the answer is in the column of desirable answers; an answer has at least one token."""
    return pc.greater(pc.list_value_length(table[DESIRABLE]), 0)
