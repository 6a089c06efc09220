"""Reads a data source as records; says which rows were left out and why, which stages object to them, and how many rows
there are."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from alignment.config.data import DataConfig, MixedConfig, OnError, SourceConfig
from alignment.core.errors import DataError
from alignment.core.wording import counted
from alignment.data.fields import Fields, SetAside
from alignment.data.formats import FORMATS, detect
from alignment.data.formats.form import Format
from alignment.data.records import Record
from alignment.data.row_files import RawRow, files_of, with_lists
from alignment.data.source_files import snapshot_name, source_rows

_ByStage = Mapping[str, DataError]


@dataclass(kw_only=True, slots=True)
class _Rows:
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


_BLOCK = 1 << 20
_LINES = (".jsonl", ".ndjson")


def count_rows(path: Path, data: SourceConfig) -> int | None:
    """The number of rows that are read of a source, or slightly more; None if only reading them would tell."""
    if snapshot_name(path) is not None or data.limit is not None:
        return None
    try:
        counts = [_rows_of(file) for file in files_of(path)]
    except (OSError, DataError):
        return None
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _rows_of(file: Path) -> int | None:
    if file.suffix.lower() in _LINES:
        return _lines_of(file)
    if file.suffix.lower() != ".parquet":
        return None
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(file).num_rows)
    except ArrowException:
        return None


def _lines_of(file: Path) -> int:
    count, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def times_as_many(file: Path, data: DataConfig, record: type[Record], records: int) -> float | None:
    """How many times as many records as the first ``records`` a stage reads; None if that would need reading them all.
    A line may give several records, or none."""
    if data.limit is not None and data.limit <= records:
        return 1.0
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    with file.open("rb") as stream:
        lines = sum(1 for _ in stream)
    every = replace(data, limit=None, on_error=OnError.skip, max_skipped=1.0)
    try:
        reading = start(file, every)
        first = sum(1 for _ in islice(iterate(file, record, every, reading=reading), records))
    except DataError:  # the stage itself reports it
        return 1.0
    times = lines / reading.rows
    return max(1.0, times if data.limit is None else min(times, data.limit / first))


def fewer_of(part: MixedConfig, path: Path, times: float) -> MixedConfig:
    """Rows that are mixed in, so many ``times`` fewer, for a stage that reads so many times fewer of its own."""
    if part.share is not None:
        return part
    if part.count is not None:
        return replace(part, count=math.ceil(part.count / times))
    number = part.limit or count_rows(path, part)
    return part if number is None else replace(part, limit=math.ceil(number / times))
