"""Reads the fields of one row. Every fault names file and line, the field, and a row of the right form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from alignment.core.errors import DataError

MEDIA = ("images", "image", "audios", "audio", "videos", "video")
"""Columns in which public files hold pictures and sound."""


class SetAside(DataError):
    """A row that is no fault, but of no use for what is asked: a pair without a common prompt, a bad answer in SFT."""


class Fields:
    """The fields of ``row``, which stands at ``where`` (``FILE:LINE``); ``example`` is a row of the right form.

    Raises:
        DataError: from every method, where the field is not what it must be.
    """

    def __init__(self, row: Any, *, where: str, example: str) -> None:
        self.where = where
        self.example = example
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be a JSON object; {row!r:.60} is none", where=where, remedy=self._remedy())
        self.row = row
        self._refuse_media()

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raises the fault of a field."""
        raise DataError(f"'{field}' {problem}", where=self.where, remedy=self._remedy())

    def set_aside(self, field: str, reason: str) -> NoReturn:
        """Raises a ``SetAside``."""
        raise SetAside(f"'{field}' {reason}", where=self.where)

    def has(self, *names: str) -> bool:
        """Whether all of these are there and not null."""
        return all(self.row.get(name) is not None for name in names)

    def first_of(self, *names: str) -> str:
        """The first of these that is there and not null."""
        found = next((name for name in names if self.has(name)), None)
        if found is None:
            self.fail(names[0], f"is missing; the row has {_listed(list(self.row))}")
        return found

    def required(self, field: str) -> Any:
        """The value, whatever it is; null counts."""
        if field not in self.row:
            self.fail(field, f"is missing; the row has {_listed(list(self.row))}")
        return self.row[field]

    def text(self, field: str) -> str:
        """Text that must be there."""
        value = self.required(field)
        if not is_text(value):
            self.fail(field, f"must be text and not empty; it is {value!r:.60}")
        return str(value)

    def optional_text(self, field: str) -> str:
        """Text that may be absent, null or empty, then empty."""
        value = self.row.get(field)
        if value is not None and not isinstance(value, str):
            self.fail(field, f"must be text; it is {value!r:.60}")
        return value or ""

    def label(self, field: str) -> str:
        """A name or number that tells rows apart; empty where the field is absent or something else."""
        value = self.row.get(field)
        return str(value) if isinstance(value, (str, int)) else ""

    def flag(self, field: str) -> bool:
        """True or false, also as files without booleans write them: 1, 0, "true", "false"."""
        value = self.required(field)
        found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
        if found is None:
            self.fail(field, f"must be true or false; it is {value!r:.60}")
        return found

    def items(self, field: str) -> list[Any]:
        """A list that is not empty."""
        value = self.required(field)
        if not isinstance(value, list) or not value:
            self.fail(field, f"must be a list and not empty; it is {value!r:.60}")
        return value

    def parsed(self, field: str, value: Any) -> Any:
        """``value``, or the JSON that it is if it is text."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            self.fail(field, f"must be JSON; it is {value!r:.60}")

    def _refuse_media(self) -> None:
        """A text model would learn an answer to a picture that it never saw."""
        for name in MEDIA:
            if self.row.get(name):
                raise DataError(
                    f"'{name}' holds media, which no stage reads: models here read text alone",
                    where=self.where,
                    remedy=f"take the row out, or the column '{name}' where the text makes sense without it",
                )

    def _remedy(self) -> str:
        return f"a row of the right form: {self.example}"


def is_text(value: Any) -> bool:
    """Whether it is text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) if names else "no fields"
