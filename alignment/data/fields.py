"""Reads the fields of one row. Every fault names file and line, the field, and a row of the right form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

from alignment.config.faults import misspelt
from alignment.core.errors import DataError
from alignment.core.files import parse_json

_WRITTEN_OUT = 1e16
"""Whole floats from here on are written with an exponent, as Python writes them."""
MEDIA = ("images", "image", "audios", "audio", "videos", "video")
"""Columns in which public files hold pictures and sound."""


class SetAside(DataError):
    """A valid row that this kind of stage cannot use: a pair without a common prompt, or a bad answer in SFT."""


class Fields:
    """The fields of ``row``, which is at ``where`` (``FILE:LINE``); ``example`` is a row of the right form. Raises
    DataError: from every method, if the field has the wrong form."""

    def __init__(self, row: Any, *, where: str, example: str) -> None:
        self.where = where
        self.example = example
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be a JSON object; this one is {row!r:.60}", where=where, remedy=self._remedy())
        self.row = row
        self._refuse_media()

    def fail(self, field: str, problem: str) -> NoReturn:
        raise DataError(f"'{field}' {problem}", where=self.where, remedy=self._remedy())

    def set_aside(self, field: str, reason: str) -> NoReturn:
        raise SetAside(f"'{field}' {reason}", where=self.where)

    def has(self, *names: str) -> bool:
        """Whether all of these fields are present and not null."""
        return all(self.row.get(name) is not None for name in names)

    def first_of(self, *names: str) -> str:
        """The first of these fields that is present and not null."""
        present = next((name for name in names if self.has(name)), None)
        if present is None:
            null = next((name for name in names if name in self.row), None)
            if null is not None:
                self.fail(null, "is null")
            self.fail_as_missing(*names)
        return present

    def required(self, field: str) -> Any:
        """The value of a field that must be present, whatever it is, even null."""
        if field not in self.row:
            self.fail_as_missing(field)
        return self.row[field]

    def text(self, field: str) -> str:
        """The text of a field that must be present and not empty."""
        value = self.required(field)
        if not is_text(value):
            self.fail(field, f"must be text and not empty; it is {value!r:.60}")
        return str(value)

    def optional_text(self, field: str) -> str:
        """The text of a field; empty if the field is absent, null or empty."""
        value = self.row.get(field)
        if value is not None and not isinstance(value, str):
            self.fail(field, f"must be text; it is {value!r:.60}")
        return value or ""

    def label(self, field: str) -> str:
        """A name or number that identifies the row; empty if the field is absent or something else."""
        value = self.row.get(field)
        return str(value) if isinstance(value, (str, int)) else ""

    def answer(self, field: str) -> str:
        """An answer as text, which may be a number; empty if the field is absent or something else."""
        value = self.row.get(field)
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() and abs(value) < _WRITTEN_OUT else str(value)
        return self.label(field)

    def number(self, field: str) -> float | None:
        """A finite number, which files without numbers write as text; None if the field is absent or something else."""
        value = self.row.get(field)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return None
        return finite(value) if is_number(value) else None

    def flag(self, field: str) -> bool:
        """True or false, also as files without booleans write them: 1, 0, "true", "false"."""
        value = self.required(field)
        parsed = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
        if parsed is None:
            self.fail(field, f"must be true or false; it is {value!r:.60}")
        return parsed

    def items(self, field: str) -> list[Any]:
        value = self.required(field)
        if not isinstance(value, list) or not value:
            self.fail(field, f"must be a list and not empty; it is {value!r:.60}")
        return value

    def parsed(self, field: str, value: Any) -> Any:
        """``value``, parsed as JSON if it is text."""
        if not isinstance(value, str):
            return value
        try:
            return parse_json(value)
        except ValueError:
            self.fail(field, f"must be JSON; it is {value!r:.60}")

    def fail_as_missing(self, *names: str, why: str = "") -> NoReturn:
        """Raises the fault of a row that has none of these fields, with the one that is probably misspelt. ``why`` says
        what the row lacks, if that is more than the fields."""
        pairs = ((name, misspelt(name, map(str, self.row))) for name in names)
        name, column = next((pair for pair in pairs if pair[1] is not None), ("", None))
        others = f", and so are {_listed(names[1:])}" if names[1:] else ""
        lacks = f": {why}" if why else f"; the row has {_listed(list(self.row))}"
        if column is None:
            self.fail(names[0], f"is missing{others}{lacks}")
        raise DataError(
            f"'{names[0]}' is missing{others}{lacks}; did you mean '{name}' by '{column}'?",
            where=self.where,
            remedy=f"rename the column '{column}', or set data.columns={{{name}: {column}}}",
        )

    def _refuse_media(self) -> None:
        """A text model would otherwise learn an answer to a picture that it never saw."""
        for name in MEDIA:
            if self.row.get(name):
                raise DataError(
                    f"'{name}' contains media, but models here read only text",
                    where=self.where,
                    remedy=f"remove the row; or remove the column '{name}', if the text makes sense without it",
                )

    def _remedy(self) -> str:
        return f"a row of the right form: {self.example}"


def is_text(value: Any) -> bool:
    """Whether ``value`` is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: float) -> float | None:
    """``value`` as a float; None if it is NaN, or too large for one."""
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) if names else "no fields"
