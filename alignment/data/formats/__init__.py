"""Formats of public data, detected by their columns. A new format is a function and an entry in ``_IN_ORDER``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from alignment.core.errors import DataError
from alignment.data.formats.conversations import (
    KTO,
    MESSAGES,
    PAIRED,
    PREFERENCE,
    SHAREGPT,
    TRANSCRIPTS,
    VOTES,
    WHOLE,
    WHOLE_MESSAGES,
)
from alignment.data.formats.form import PROMPTS, Format
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
from alignment.data.records import SCORE_COLUMNS

# Formats that need more columns come earlier, because the first one that fits a row is taken.
_IN_ORDER = (
    TRANSCRIPTS,
    WHOLE,
    PREFERENCE,
    PAIRED,
    WHOLE_MESSAGES,
    VOTES,
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
FORMATS: dict[str, Format] = {form.name: form for form in _IN_ORDER}
_BESIDE = ("system", "history", "input", "tools", "reference", "id", "task", "flaw", "subset", *SCORE_COLUMNS)
ANSWERED = tuple(form.name for form in (MESSAGES, SHAREGPT, PROMPT_COMPLETION, ALPACA, QUESTION_ANSWER))
"""Formats of rows with an answer that a label may judge."""
LABEL = "label"
"""The column that says whether an answer is good."""
COLUMNS = sorted({*PROMPTS, *_BESIDE, *(name for form in _IN_ORDER for name in json.loads(form.row))})
"""Every column that a format or a record reads."""


class UnknownColumns(DataError):
    """No format has the columns of any row."""


def format_of(row: Any) -> Format | None:
    """The first format that the row's columns fit."""
    return next((form for form in _IN_ORDER if isinstance(row, Mapping) and form.fits(row)), None)


def _named_like(row: Any) -> Format | None:
    """The format with the most columns of which the row has all, whatever their content: enough to say what is wrong
    with the row."""
    columns = set(row) if isinstance(row, Mapping) else set()
    forms = [form for form in _IN_ORDER if set(json.loads(form.row)) <= columns]
    return max(forms, key=lambda form: len(json.loads(form.row)), default=None)


def _meant(fits: Format, row: Any, present: set[str]) -> Format:
    """The format that a row is meant for. If the row has the columns of a format that needs more of them, and other
    rows fit that format, then this row is a faulty row of that format."""
    more = _IN_ORDER[: _IN_ORDER.index(fits)]
    return next((form for form in more if form.name in present and set(json.loads(form.row)) <= set(row)), fits)


def detect(rows: Sequence[Any], *, where: str, mapped: Collection[str] = ()) -> Format:
    """The format that fits most of the rows; if none fits any, the format whose columns most of the rows have. A column
    that the user ``mapped`` to ``label`` is one, and not a class, whatever its values are. Raises UnknownColumns: no
    format has the columns of any row; the error names the columns."""
    fitting = [format_of(row) for row in rows]
    present = {form.name for form in fitting if form is not None}
    for guesses in (fitting, [_named_like(row) for row in rows]):
        pairs = zip(guesses, rows, strict=True)
        counts = Counter(_meant(guess, row, present).name for guess, row in pairs if guess is not None)
        if counts:
            form = FORMATS[counts.most_common(1)[0][0]]
            return KTO if LABEL in mapped and form in (SHAREGPT, ALPACA, QUESTION_ANSWER) else form
    columns = sorted({name for row in rows if isinstance(row, Mapping) for name in row})
    raise UnknownColumns(
        f"no known format has the columns {', '.join(map(repr, columns)) or 'none'}",
        where=where,
        remedy=f"map your columns (data.columns={{prompt: YOURS}}) to a format: {', '.join(FORMATS)}",
    )
