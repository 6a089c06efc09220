"""A source as rows of token ids on disk, cached by content and memory-mapped. Everything that could change a row is
part of the folder's name: the content of the rows, how they are read, the limits, tokenizer and template, and this
code's version. An exception is a template that asks for today's date: its rows keep the day on which they were made. If
two processes want the same table, the second waits until the first has made it. A process that was interrupted leaves
what it has made, and the next one goes on from there."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from datasets import Dataset

from alignment.config.data import SourceConfig
from alignment.core.artifacts import write_json
from alignment.core.errors import DataError, StageError
from alignment.core.files import disk_error, parse_json
from alignment.core.fingerprint import digest
from alignment.core.locks import held
from alignment.data.reading import DATA, NAMED, Reader, nothing, refuse_faults, start
from alignment.data.source_files import content_of, snapshot_name, unparsed_source_rows
from alignment.data.tokens.chunks import Chunk, Job, run
from alignment.data.tokens.row_kinds import Kind, Limits, refuse_losses
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.records.stages import CUT, FAULT, LOST, SET_ASIDE, TOO_LONG

ROWS, LEDGER, COUNTS, UNFINISHED = "rows.arrow", "left_out.jsonl", "counts.json", "unfinished.json"
EVERY_SECONDS = 30.0
"""Seconds of work that an interruption loses at most."""
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end of a stream of Arrow."""
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Counts:
    """What a table holds. ``read`` rows of the source gave ``records`` records of at most ``longest`` tokens. ``notes``
    counts the entries of the ledger by kind, and ``first`` holds the first entries of each kind. ``affected`` counts
    the rows that were left out or cut; a row of several records may have several entries."""

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
    """Writes a table, or the rest of one. ``chunks`` gives those that follow the rows and records that are counted
    already. ``progress`` receives the number of rows read."""
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


VERSION = 7
"""Raised when the rows change, so that older tables are not used."""


@dataclass(kw_only=True)
class TokenTable(Counts):
    """Token rows with the kind's columns and ``where``; ``ledger`` is the file with the notes."""

    path: Path
    rows: Dataset
    ledger: Path

    def count(self, kind: str) -> int:
        return self.notes.get(kind, 0)

    @property
    def losses(self) -> dict[str, int]:
        """How many records lose what in the chat template: ``{"thoughts of earlier turns": 12}``."""
        begin = f"{LOST}: "
        return {kind.removeprefix(begin): count for kind, count in self.notes.items() if kind.startswith(begin)}


def token_table(
    path: Path,
    data: SourceConfig,
    kind: Kind,
    limits: Limits,
    tokenizer: Any,
    *,
    cache: Path,
    processes: int,
    setting: str = DATA,
    progress: Callable[[int], None] | None = None,
) -> TokenTable:
    """The source's table from the folder ``cache``; made there if it is missing. ``progress`` is called with the number
    of rows read, which is 0 while another process makes the table. Errors name the ``setting`` that holds ``data``.
    Raises DataError: the source cannot be read at all; rows are faulty and may not be skipped; too many are too long;
    or no row is left. Raises StageError: the table cannot be written, or a process that makes it died."""
    form = start(path, data).format
    job = Job(tokenizer=tokenizer, kind=kind, reader=Reader(format=form, record=kind.record, data=data), limits=limits)
    folder = cache / f"tokens-{_key(path, data, job)}"
    waiting = None if progress is None else functools.partial(progress, 0)
    with held(cache / f".{folder.name}.lock", wait=True, waiting=waiting):
        table = _open(path, folder)
        if table is None:
            _make(folder, job.schema, functools.partial(_chunks, path, data, job, processes), progress)
            table = _open(path, folder)
    if table is None:
        raise StageError("token rows that were just written cannot be read", where=str(folder), remedy="check the disk")
    faults = [
        DataError(note["reason"], where=note["where"], remedy=note.get("remedy", ""))
        for note in table.first.get(FAULT, [])
    ]
    refuse_faults(
        faults,
        data,
        count=table.count(FAULT),
        rows=table.read,
        path=path,
        setting=setting,
        stopped=table.records == data.limit,
    )
    refuse_losses(
        limits,
        dropped=table.count(TOO_LONG),
        cut=table.count(CUT),
        records=table.records,
        longest=table.longest,
        where=str(path),
    )
    if not len(table.rows):
        reasons = (note["reason"] for note in table.first.get(SET_ASIDE, []))
        raise nothing(reasons, rows=table.read, where=str(path))
    return table


def _chunks(path: Path, data: SourceConfig, job: Job, processes: int, before: Counts) -> Iterator[Chunk]:
    rows = islice(unparsed_source_rows(path, data), before.read, None)
    left = None if data.limit is None else data.limit - before.records
    return iter(()) if left == 0 else run(job, rows, limit=left, processes=processes)


def _key(path: Path, data: SourceConfig, job: Job) -> str:
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    content = {
        "version": [VERSION, *versions],
        "content": [content_of(path), *_files(path)],
        "where": [str(path), data.split, data.subset],  # part of the rows
        "format": job.reader.format.name,
        "columns": data.columns,
        "placeholders": data.placeholders,
        "limit": data.limit,
        "kind": job.kind.name,
        "limits": job.limits,
        "tokenizer": _of_tokenizer(job.tokenizer),
    }
    return digest(content)[:32]


def _files(path: Path) -> list[list[str | int]]:
    """The files of a hub's snapshot that are on this machine; the snapshot's name covers all files, present or not."""
    if snapshot_name(path) is None:
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [[file.relative_to(path).as_posix(), file.stat().st_size] for file in files]


def _of_tokenizer(tokenizer: Any) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = "" if backend is None else backend.to_str()
    return [*tokenizer_hashes(tokenizer).values(), hashlib.sha256(pipeline.encode()).hexdigest()]


def _make(
    folder: Path, schema: pa.Schema, chunks: Callable[[Counts], Iterable[Chunk]], progress: Callable[[int], None] | None
) -> None:
    """Makes the table. What an error leaves is removed, and what an interruption leaves is used the next time."""
    try:
        write(folder, schema, chunks, progress)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise disk_error(error, folder=folder) or StageError(
            f"token rows cannot be written: {error}", where=str(folder), remedy="free space, or choose another output="
        ) from error


def _open(path: Path, folder: Path) -> TokenTable | None:
    try:
        stored = parse_json((folder / COUNTS).read_text(encoding="utf-8"))
        if stored["sizes"] != file_sizes(folder):
            raise ValueError("a file is cut short")
        rows = Dataset.from_file(str(folder / ROWS))
        return TokenTable(path=path, rows=rows, ledger=folder / LEDGER, **stored["counts"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        log.warning("%s cannot be used and will be made again: %s", folder, error)
        return None
