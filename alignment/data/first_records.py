"""How much more a stage reads than its first records, and how much of the rows that are mixed in goes with these."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

from alignment.config.data import DataConfig, MixedConfig, OnError
from alignment.core.errors import DataError
from alignment.data.reading import iterate, start
from alignment.data.records import Record
from alignment.data.row_count import count_rows


def times_as_many(file: Path, data: DataConfig, record: type[Record], records: int) -> float | None:
    """How many times as many records as the first ``records`` a stage reads; None if that would need reading them all.

    A line may give several records, or none.
    """
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
