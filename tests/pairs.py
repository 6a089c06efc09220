"""Pairs of token ids as a test writes them and as the stages read them, and arguments of TRL's own trainers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from datasets import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPair:
    """A prompt ready for an answer, and two answers up to and including the end of the turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def as_table(pairs: Iterable[TokenizedPair]) -> Dataset:
    return Dataset.from_list([asdict(pair) for pair in pairs])


def as_pairs(table: Dataset) -> list[TokenizedPair]:
    """The pairs of a table that ``read_pairs`` gave, without their places."""
    return [TokenizedPair(**row) for row in table.select_columns(["prompt", "chosen", "rejected"])]
