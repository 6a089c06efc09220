"""Rows that stages object to, and the command that examines the same rows: all are counted, the first ones are held. A
file of ten million rows may be faulty in every row for one of the stages that could read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from typing import Any

from alignment.config.data import SourceConfig
from alignment.core.errors import DataError

_ByStage = Mapping[str, DataError]


@dataclass(kw_only=True, slots=True)
class _Rows:
    """Rows to which the same stages object: how many, and the number and errors of the first ones."""

    count: int = 0
    first: list[tuple[int, _ByStage]] = field(default_factory=list)


class Objections:
    """Rows with the error of each stage that objects; the first ``held`` rows of each combination of stages are kept.
    Example: rows 3 and 9 are faulty for ``dpo``, and row 5 for ``dpo`` and ``sft``. ``count(["dpo"])`` is 3,
    ``count(["sft"])`` 1, and ``count(["dpo", "sft"])`` 3."""

    def __init__(self, held: int) -> None:
        self._held = held
        self._rows: dict[tuple[str, ...], _Rows] = {}

    def add(self, number: int, errors: _ByStage) -> None:
        """Row ``number``, which is greater than those before, has a ``bare`` error for at least one stage."""
        rows = self._rows.setdefault(tuple(errors), _Rows())
        rows.count += 1
        if len(rows.first) < self._held:
            rows.first.append((number, dict(errors)))

    def count(self, stages: Collection[str]) -> int:
        """Number of rows to which one of the stages objects."""
        return sum(rows.count for rows in self._of(stages))

    def first(self, stages: Sequence[str]) -> list[DataError]:
        """The errors of the first ``held`` rows to which one of the stages objects, in the order of rows. The first of
        ``stages`` that objects says what is wrong."""
        return [error for _, error in self.numbered(stages)]

    def numbered(self, stages: Sequence[str]) -> list[tuple[int, DataError]]:
        """Like ``first``, with the number of each row."""
        in_order = merge(*(rows.first for rows in self._of(stages)), key=lambda row: row[0])
        return [
            (number, next(errors[stage] for stage in stages if stage in errors))
            for number, errors in islice(in_order, self._held)
        ]

    def stages(self) -> set[str]:
        """The stages that object to a row."""
        return {stage for objecting in self._rows for stage in objecting}

    def _of(self, stages: Collection[str]) -> list[_Rows]:
        return [rows for objecting, rows in self._rows.items() if not set(objecting).isdisjoint(stages)]


def bare(error: DataError) -> DataError:
    """The error without its traceback, which would keep the row and everything that was made of it in memory."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


READ = ("split", "subset", "format", "columns", "placeholders")
"""Settings that say how rows are read."""
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_][A-Za-z0-9_]*", re.IGNORECASE)
"""Texts that need no quotes in an override."""


def written(data: SourceConfig, prefix: str = "") -> list[str]:
    """``KEY=VALUE`` for each setting of how rows are read that is not at its default."""
    usual = SourceConfig()
    chosen = {name: getattr(data, name) for name in READ if getattr(data, name) != getattr(usual, name)}
    return [f"{prefix}{name}={_as_typed(value)}" for name, value in chosen.items()]


def doctor_command(source: str, data: SourceConfig) -> str:
    """The command that examines the rows of ``source``, read as ``data`` says."""
    return shlex.join(["align", "doctor", source, *written(data)])


def _as_typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_typed(item)}' for key, item in value.items())}}}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
