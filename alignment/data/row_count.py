"""How many rows a source has, where that takes seconds for millions of rows: for progress, not for results."""

from __future__ import annotations

from pathlib import Path

from alignment.config.data import SourceConfig
from alignment.core.errors import DataError
from alignment.data.hub_rows import snapshot_name
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
