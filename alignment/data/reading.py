"""Reads a data source as records, and notes which rows were left out and why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from alignment.config.data import OnError, SourceConfig
from alignment.core.errors import DataError
from alignment.core.wording import counted
from alignment.data.fields import Fields, SetAside
from alignment.data.formats import FORMATS, detect
from alignment.data.formats.form import Format
from alignment.data.hub_rows import snapshot_name, source_rows
from alignment.data.list_texts import with_lists
from alignment.data.objections import bare, doctor_command
from alignment.data.records import Record
from alignment.data.row_files import RawRow

R = TypeVar("R", bound=Record)
LOOKED_AT = 100
"""Rows from which a format is detected."""
NAMED = 20
"""Faults that an error lists; it counts the others."""
NEXT = "\n  → "
"""Separator between remedies."""
DATA = "data"
"""The setting that errors name if the caller names no other."""
REASONS = 1_000
"""Different reasons that are counted; a reason may quote a row, so there may be as many as rows."""


@dataclass(kw_only=True)
class LeftOut:
    """Rows that gave no record: their ``count``, the errors of the ``first`` ones, and the count of each reason. A file
    may have ten million of them, so no more is held in memory."""

    count: int = 0
    first: list[DataError] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(bare(error))
        if error.message in self.reasons or len(self.reasons) < REASONS:
            self.reasons[error.message] += 1


@dataclass(kw_only=True)
class Reading:
    """Progress of a reading: ``faults`` and ``set_aside`` grow while records are read. ``on_left_out`` receives the
    error of every row that is left out. ``setting`` is the setting that holds the source, ``stages.sft.data``, which
    errors name. ``stopped`` says that ``limit`` ended the reading, so that later rows are unknown."""

    path: Path
    format: Format
    rows: int = 0
    setting: str = DATA
    stopped: bool = False
    faults: LeftOut = field(default_factory=LeftOut)
    set_aside: LeftOut = field(default_factory=LeftOut)
    on_left_out: Callable[[DataError], None] | None = None

    def leave_out(self, error: DataError) -> None:
        (self.set_aside if isinstance(error, SetAside) else self.faults).add(error)
        if self.on_left_out is not None:
            self.on_left_out(error)


def read_records(path: Path, record: type[R], data: SourceConfig, *, reading: Reading | None = None) -> list[R]:
    """All records of the source, at most ``data.limit``; ``reading`` is as in ``iterate``. Raises DataError: see
    ``iterate``."""
    return list(iterate(path, record, data, reading=reading))


def iterate(path: Path, record: type[R], data: SourceConfig, *, reading: Reading | None = None) -> Iterator[R]:
    """Yields the source's records. ``reading``, which ``start`` makes, records what was left out. Raises DataError:
    rows are faulty (one error names them together), unless ``data.on_error`` skips them and they are few (see
    ``refuse_faults``); or the source has no record."""
    progress = start(path, data) if reading is None else reading
    taken = 0
    for record_of_row in _examined(progress, record, data):
        yield record_of_row
        taken += 1
        if taken == data.limit:
            progress.stopped = True
            break
    refuse_faults_of(progress, data)
    if not taken:
        raise nothing(progress.set_aside.reasons, rows=progress.rows, where=str(progress.path))


def start(path: Path, data: SourceConfig, *, setting: str = DATA) -> Reading:
    """A new reading of the source in ``setting``; the format is the configured one, or detected from the first rows.
    Raises DataError: the source has no rows, or no row has the columns of a known format."""
    if data.format is not None and not data.columns:
        return Reading(path=path, format=FORMATS[data.format], setting=setting)
    all_rows = source_rows(path, data)
    head = list(islice(all_rows, LOOKED_AT))
    _refuse_unknown_columns(head, all_rows, data, where=str(path))
    if data.format is not None:
        return Reading(path=path, format=FORMATS[data.format], setting=setting)
    rows = [prepared(row.value, data) for row in head if isinstance(row, RawRow)]
    if not rows:
        faults = [row for row in head if isinstance(row, DataError)]
        raise (
            together(faults)
            if faults
            else DataError("contains no rows", where=str(path), remedy="write at least one row")
        )
    return Reading(path=path, format=detect(rows, where=str(path), mapped=data.columns), setting=setting)


def _refuse_unknown_columns(
    head: Sequence[RawRow | DataError], later: Iterator[RawRow | DataError], data: SourceConfig, *, where: str
) -> None:
    """Reads ``later`` rows only as far as a column of the settings is still missing: it may be optional."""
    known = {name for row in head for name in _columns(row)}
    missing = set(data.columns.values()) - known
    while known and missing and (row := next(later, None)) is not None:
        missing.difference_update(_columns(row))
    for column in data.columns.values():
        if known and column in missing:
            raise DataError(
                f"data.columns names the column {column!r}, which no row has",
                where=where,
                remedy=f"the columns are {', '.join(sorted(known))}",
            )


def _columns(row: RawRow | DataError) -> Iterable[str]:
    return row.value if isinstance(row, RawRow) and isinstance(row.value, Mapping) else ()


def _examined(reading: Reading, record: type[R], data: SourceConfig) -> Iterator[R]:
    reader = Reader(format=reading.format, record=record, data=data)
    for row in source_rows(reading.path, data):
        reading.rows += 1
        try:
            records = reader.records(row)
        except DataError as error:
            reading.leave_out(error)
        else:
            yield from records


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Makes records of rows of ``format``, with the columns and placeholders of ``data``."""

    format: Format
    record: type[Any]
    data: SourceConfig

    @cached_property
    def _example(self) -> str:
        return right_form(self.format, self.record)

    def records(self, row: RawRow | DataError) -> list[Any]:
        """All records of a row; a fault in any pair makes the whole row faulty. Raises DataError: the row is faulty, or
        (SetAside) this kind of stage cannot use it."""
        if isinstance(row, DataError):
            raise row
        value = prepared(row.value, self.data)
        return list(self.record.of(self.format.read(Fields(value, where=row.where, example=self._example))))


def right_form(form: Format, record: type[Any]) -> str:
    """An example row for errors: the format's own, if the record can be made of it."""
    try:
        list(record.of(form.read(Fields(json.loads(form.row), where="", example=""))))
    except DataError:
        return str(record.EXAMPLE)
    return form.row


def together(faults: Sequence[DataError], count: int | None = None, *, among: str = "", where: str = "") -> DataError:
    """One error for all faults; equal messages are listed once, with the location of the first. ``count`` is the total
    number of faults if ``faults`` holds only the first ones. ``among`` says in which rows they are, and ``where`` which
    setting names these rows."""
    count = len(faults) if count is None else count
    if count == 1:
        return faults[0]
    alike: dict[str, list[DataError]] = {}
    for fault in faults[:NAMED]:
        alike.setdefault(fault.message, []).append(fault)
    lines = ""
    for message, same in alike.items():
        others = f" and {counted(len(same) - 1, 'other row', 'other rows')}" if len(same) > 1 else ""
        lines += f"\n  {same[0].where}{others}: {message}"
    more = f"\n  and {count - NAMED} more" if count > NAMED else ""
    remedy = NEXT.join(dict.fromkeys(fault.remedy for fault in faults[:NAMED] if fault.remedy))
    return DataError(f"{count} faulty rows{among}:{lines}{more}", where=where, remedy=remedy)


def refuse_faults_of(reading: Reading, data: SourceConfig) -> None:
    """``refuse_faults`` for a reading that has ended."""
    refuse_faults(
        reading.faults.first,
        data,
        count=reading.faults.count,
        rows=reading.rows,
        path=reading.path,
        setting=reading.setting,
        stopped=reading.stopped,
    )


def refuse_faults(
    faults: Sequence[DataError],
    data: SourceConfig,
    *,
    count: int,
    rows: int,
    path: Path | None = None,
    setting: str = DATA,
    stopped: bool = False,
) -> None:
    """Accepts ``rows`` without faults, or with few faults if ``data`` skips them. If the reading ``stopped`` at
    ``data.limit``, the share of faulty rows is not judged: many faults among the first rows do not mean that there are
    many in the file. Raises DataError: otherwise. It lists ``faults``, the first of ``count``, and names the
    ``setting``."""
    if not count:
        return
    named = "" if setting == DATA else setting
    error = together(faults, count, among=f" among the first {rows:,} rows" if stopped else "", where=named)
    if data.on_error is OnError.fail:
        check = "" if path is None else f"`{doctor_command(snapshot_name(path) or str(path), data)}` checks all rows; "
        way_out = f"{check}{_skipping(data, count=count, rows=rows, setting=setting, stopped=stopped)}"
        raise DataError(error.message, where=error.where, remedy=NEXT.join(filter(None, [error.remedy, way_out])))
    if not stopped and count / rows > data.max_skipped:
        raise DataError(
            f"more than {data.max_skipped:.0%} of {rows} rows are faulty; {error.message}",
            where=named or ("" if path is None else str(path)),
            remedy=f"fix the rows, or set {setting}.max_skipped={_share(count, rows):g}",
        )


def _skipping(data: SourceConfig, *, count: int, rows: int, setting: str, stopped: bool) -> str:
    skip, most = f"{setting}.on_error=skip", f"{setting}.max_skipped"
    if stopped:
        return f"{skip} leaves out the faulty ones, if they are at most {data.max_skipped:.0%} of the file ({most})"
    if count == rows:
        return "no row is usable"
    if count / rows <= data.max_skipped:
        return f"{skip} leaves out the faulty ones"
    return f"{skip} {most}={_share(count, rows):g} leave out the faulty ones"


def _share(count: int, rows: int) -> float:
    """The smallest share in hundredths that allows ``count`` faulty ``rows``."""
    return math.ceil(100 * count / rows) / 100


def nothing(set_aside: Iterable[str], *, rows: int, where: str) -> DataError:
    """The error for a source without a single record."""
    reasons = sorted(set(set_aside))
    why = f": all {rows} rows were set aside ({'; '.join(reasons)})" if reasons else ""
    return DataError(f"contains no usable row{why}", where=where)


def prepared(row: Any, data: SourceConfig) -> Any:
    """The row with columns renamed and placeholders filled as configured, and with lists in place of their JSON."""
    if data.columns and isinstance(row, Mapping):
        taken = set(data.columns.values())
        others = {name: value for name, value in row.items() if name not in taken}
        row = others | {name: row[column] for name, column in data.columns.items() if column in row}
    return _filled(with_lists(row), data.placeholders)


def _filled(value: Any, placeholders: Mapping[str, str]) -> Any:
    if not placeholders:
        return value
    if isinstance(value, str):
        for name, text in placeholders.items():
            value = value.replace("{{" + name + "}}", text)
        return value
    if isinstance(value, Mapping):
        return {key: _filled(item, placeholders) for key, item in value.items()}
    return [_filled(item, placeholders) for item in value] if isinstance(value, list) else value
