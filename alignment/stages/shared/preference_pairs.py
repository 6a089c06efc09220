"""Preference pairs as token ids, shared by the stages that learn from them.

They stay in the Arrow file of the token table, with the columns ``prompt`` (ready for an answer), ``chosen`` and
``rejected`` (each up to and including the end of the turn), and perhaps ``margin``. Only rows that are read are loaded
into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from datasets import Dataset

from alignment.config.data import DataConfig
from alignment.stages.shared.kind_answers import LimitedConfig, limits_of_parts, pair_rows
from alignment.stages.shared.stage_rows import token_rows
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
