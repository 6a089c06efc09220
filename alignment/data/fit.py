"""Rows that are too long are left out and counted; too many of them are an error, never a silent loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from alignment.errors import DataError

Row = TypeVar("Row")

MAX_DROPPED_SHARE = 0.1


def rows_that_fit(
    rows: Sequence[Row], length: Callable[[Row], int], *, max_length: int, where: str
) -> tuple[list[Row], int]:
    """The rows of at most ``max_length`` tokens, and how many were left out.

    Raises:
        DataError: more than a tenth of the rows are too long, or none is left.
    """
    kept = [row for row in rows if length(row) <= max_length]
    dropped = len(rows) - len(kept)
    if not kept or dropped > MAX_DROPPED_SHARE * len(rows):
        longest = max((length(row) for row in rows), default=0)
        raise DataError(
            f"{dropped} of {len(rows)} rows are longer than {max_length} tokens (the longest has {longest})",
            where=where,
            remedy=f"raise the stage's length limit to at least {longest}, or shorten the rows",
        )
    return kept, dropped
