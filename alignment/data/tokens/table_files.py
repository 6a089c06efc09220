"""The files of a token table, written chunk by chunk so that a process that was interrupted can go on.

``rows.arrow`` is a stream of Arrow, ``left_out.jsonl`` the ledger. ``unfinished.json`` has the sizes that both had at
some moment, and what they held then; more may have been written since, which is cut off. ``counts.json`` is written
last and ends the table.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from alignment.core.artifacts import write_json
from alignment.core.files import parse_json
from alignment.data.reading import NAMED
from alignment.data.tokens.chunks import Chunk
from alignment.records.left_out import LOST

ROWS, LEDGER, COUNTS, UNFINISHED = "rows.arrow", "left_out.jsonl", "counts.json", "unfinished.json"
EVERY_SECONDS = 30.0
"""Seconds of work that an interruption loses at most."""
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end of a stream of Arrow."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Counts:
    """What a table holds. ``read`` rows of the source gave ``records`` records of at most ``longest`` tokens.

    ``notes`` counts the entries of the ledger by kind, and ``first`` holds the first entries of each kind. ``affected``
    counts the rows that were left out or cut; a row of several records may have several entries.
    """

    read: int = 0
    records: int = 0
    longest: int = 0
    affected: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> list[dict[str, str]]:
        """Counts a chunk; returns its entries of the ledger."""
        self.read += chunk.rows
        self.records += chunk.records
        self.longest = max(self.longest, chunk.longest)
        self.affected += len({note.where for note in chunk.notes if not note.kind.startswith(LOST)})
        rows = [note.as_row() for note in chunk.notes]
        for row in rows:
            kind = row["kind"]
            self.notes[kind] = self.notes.get(kind, 0) + 1
            if self.notes[kind] <= NAMED:
                self.first.setdefault(kind, []).append(row)
        return rows


def write(
    folder: Path, schema: pa.Schema, chunks: Callable[[Counts], Iterable[Chunk]], progress: Callable[[int], None] | None
) -> None:
    """Writes a table, or the rest of one.

    ``chunks`` gives those that follow the rows and records that are counted already. ``progress`` receives the number
    of rows read.
    """
    counts, sizes = _unfinished(folder)
    if sizes is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / ROWS).write_bytes(schema.serialize())
        (folder / LEDGER).touch()
    else:
        log.info("%s continues after %d rows", folder, counts.read)
        for name, size in zip((ROWS, LEDGER), sizes, strict=True):
            os.truncate(folder / name, size)
    saved = time.monotonic()
    with (folder / ROWS).open("ab") as rows, (folder / LEDGER).open("a", encoding="utf-8") as ledger:
        for chunk in chunks(counts):
            rows.write(chunk.batch.serialize())
            ledger.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in counts.add(chunk))
            if time.monotonic() - saved >= EVERY_SECONDS:
                _store(rows, ledger)
                write_json(folder / UNFINISHED, {"sizes": file_sizes(folder), "counts": asdict(counts)})
                saved = time.monotonic()
            if progress is not None:
                progress(counts.read)
        rows.write(_END)
        _store(rows, ledger)
    write_json(folder / COUNTS, {"sizes": file_sizes(folder), "counts": asdict(counts)})
    (folder / UNFINISHED).unlink(missing_ok=True)


def _store(*files: IO[Any]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def file_sizes(folder: Path) -> list[int]:
    """Bytes of the rows and of the ledger."""
    return [(folder / name).stat().st_size for name in (ROWS, LEDGER)]


def _unfinished(folder: Path) -> tuple[Counts, list[int] | None]:
    """What an interrupted process has left, and the sizes that its files had; None if it has left nothing of use."""
    try:
        stored: dict[str, Any] = parse_json((folder / UNFINISHED).read_text(encoding="utf-8"))
        sizes = [int(size) for size in stored["sizes"]]
        whole = all(now >= size for now, size in zip(file_sizes(folder), sizes, strict=True))
        return (Counts(**stored["counts"]), sizes) if whole else (Counts(), None)
    except (OSError, ValueError, LookupError, TypeError):
        return Counts(), None
