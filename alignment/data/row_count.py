"""How many rows a source has, and how much more a stage reads than its first records."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

from alignment.config.data import DataConfig, MixedConfig, OnError, SourceConfig
from alignment.core.errors import DataError
from alignment.data.hub_rows import snapshot_name
from alignment.data.reading import iterate, start
from alignment.data.records import Record
from alignment.data.row_files import files_of

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
    """Line breaks, and a last line without one; blank lines count too."""
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
