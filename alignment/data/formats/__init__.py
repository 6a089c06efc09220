"""Formats of public data, told apart by their columns. A new one is a function and an entry in ``FORMATS``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.core.errors import DataError
from alignment.data.formats.conversations import KTO, MESSAGES, SHAREGPT
from alignment.data.formats.form import PROMPTS, Format
from alignment.data.formats.pairs import PAIRED, PREFERENCE, TRANSCRIPTS, WHOLE, WHOLE_MESSAGES
from alignment.data.formats.plain import (
    ALPACA,
    CHOICES,
    PROMPT,
    PROMPT_COMPLETION,
    QUESTION_ANSWER,
    QUESTIONS,
    RANKED,
    TEXT,
)

# The more columns a format asks for, the earlier it stands: the first that fits a row is taken.
_IN_ORDER = (
    TRANSCRIPTS,
    WHOLE,
    PREFERENCE,
    PAIRED,
    WHOLE_MESSAGES,
    RANKED,
    CHOICES,
    KTO,
    MESSAGES,
    SHAREGPT,
    PROMPT_COMPLETION,
    ALPACA,
    QUESTION_ANSWER,
    QUESTIONS,
    PROMPT,
    TEXT,
)
FORMATS: dict[str, Format] = {one.name: one for one in _IN_ORDER}
_BESIDE = ("system", "history", "input", "tools", "reference", "id", "task", "flaw", "subset")
COLUMNS = sorted({*PROMPTS, *_BESIDE, *(name for one in _IN_ORDER for name in json.loads(one.row))})
"""Every column that a format or a record reads."""


def format_of(row: Any) -> Format | None:
    """The first format that the row's columns fit."""
    return next((one for one in _IN_ORDER if isinstance(row, Mapping) and one.fits(row)), None)


def _named_like(row: Any) -> Format | None:
    """The first format whose columns the row has, whatever is in them: enough to say what is wrong with it."""
    columns = set(row) if isinstance(row, Mapping) else set()
    return next((one for one in _IN_ORDER if set(json.loads(one.row)) <= columns), None)


def _meant(fits: Format, row: Any, present: set[str]) -> Format:
    """A row with the columns of a format that asks for more, which other rows fit, is a faulty row of that one."""
    more = _IN_ORDER[: _IN_ORDER.index(fits)]
    return next((one for one in more if one.name in present and set(json.loads(one.row)) <= set(row)), fits)


def detect(rows: Sequence[Any], *, where: str) -> Format:
    """The format that most of the rows have; where none has one, that whose columns most of them have.

    Raises:
        DataError: no format fits any of them; names the columns that are there.
    """
    fitting = [format_of(row) for row in rows]
    present = {one.name for one in fitting if one is not None}
    for told in (fitting, [_named_like(row) for row in rows]):
        found = Counter(_meant(one, row, present).name for one, row in zip(told, rows, strict=True) if one is not None)
        if found:
            return FORMATS[found.most_common(1)[0][0]]
    columns = sorted({name for row in rows if isinstance(row, Mapping) for name in row})
    raise DataError(
        f"no format is known for rows with the columns {', '.join(map(repr, columns)) or 'none'}",
        where=where,
        remedy=f"say which column is which (data.columns={{prompt: YOURS}}), for one of: {', '.join(FORMATS)}",
    )
