"""Turns rows of a source into rows of token ids, a thousand at a time, in several processes if there are many."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from typing import Any

import pyarrow as pa

from alignment.core.deadline import KILLED_BY, KILLED_SECONDS
from alignment.core.errors import DataError, ModelError, StageError
from alignment.data.fields import SetAside
from alignment.data.reading import Reader
from alignment.data.row_files import JsonLine, Unparsed, parsed
from alignment.data.tokens.row_kinds import Kind, Limits, RowTooLong, Tokenized, tokenized
from alignment.records.stages import CUT, FAULT, LOST, SET_ASIDE, TOO_LONG, Note

CHUNK = 1_000
"""Rows that a process receives at once."""
FEW = 8
"""With fewer chunks it is not worth starting processes."""
_BY_TEMPLATE = "the chat template leaves it out"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Token rows of some rows of the source. ``batch`` holds the token rows of ``records`` records, which came from
    ``rows`` rows of the source. ``longest`` is the number of tokens of the longest record, also if it was dropped."""

    batch: pa.RecordBatch
    notes: Sequence[Note]
    rows: int
    records: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """Turns rows of a source into token rows."""

    tokenizer: Any
    kind: Kind
    reader: Reader
    limits: Limits

    @property
    def schema(self) -> pa.Schema:
        """Columns of the token rows, and where in the source each comes from."""
        ids = ((name, pa.list_(pa.int32())) for name in self.kind.columns)
        numbers = ((name, pa.float64()) for name in self.kind.numbers)
        return pa.schema([("where", pa.string()), *ids, *numbers])

    def __call__(self, rows: Sequence[Unparsed], at_most: int | None = None) -> Chunk:
        """The token rows of the first ``at_most`` records of these rows, or of all."""
        notes: list[Note] = []
        records: list[Any] = []
        read = 0
        for row in rows:
            if at_most is not None and len(records) >= at_most:
                break
            read += 1
            try:
                records += self.reader.records(parsed(row))
            except DataError as error:
                notes.append(note_of_error(error))
        columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        longest = 0
        for tokenized_record in tokenized(self.tokenizer, self.kind, records[:at_most], self.limits):
            longest = max(longest, tokenized_record.tokens)
            notes += notes_of(tokenized_record)
            for row_of_ids in tokenized_record.rows:
                columns["where"].append(tokenized_record.record.where)
                for name, ids in row_of_ids.items():
                    columns[name].append(ids)
                for name, number_of in self.kind.numbers.items():
                    columns[name].append(number_of(tokenized_record.record))
        return Chunk(
            batch=pa.RecordBatch.from_pydict(columns, schema=self.schema),
            notes=notes,
            rows=read,
            records=len(records[:at_most]),
            longest=longest,
        )


def notes_of(tokenized: Tokenized) -> list[Note]:
    """The notes on a record that was left out or cut, or of which the chat template left something out."""
    if tokenized.fault is not None:
        return [note_of_error(tokenized.fault)]
    where = tokenized.record.where
    cut = [Note(where=where, kind=CUT, reason=tokenized.cut)] if tokenized.cut else []
    lost = [Note(where=where, kind=f"{LOST}: {loss}", reason=_BY_TEMPLATE) for loss in sorted(tokenized.lost)]
    return cut + lost


def note_of_error(error: DataError) -> Note:
    kind = {SetAside: SET_ASIDE, RowTooLong: TOO_LONG}.get(type(error), FAULT)
    return Note(where=error.where, kind=kind, reason=error.message, remedy=error.remedy)


def run(job: Job, rows: Iterable[Unparsed], *, limit: int | None, processes: int) -> Iterator[Chunk]:
    """Yields chunks in the order of the rows. With a ``limit`` on the number of records, one process does all. Raises
    ModelError: a process was killed because a template did not terminate. Raises StageError: a process died."""
    left = iter(rows)
    chunks = iter(lambda: list(islice(left, CHUNK)), [])
    if limit is not None:
        for some in chunks:
            yield (chunk := job(some, limit))
            limit -= chunk.records
            if limit == 0:
                return
        return
    first = list(islice(chunks, FEW))
    few = len(first) < FEW
    chunks = chain(first, chunks)
    del first  # thousands of rows
    if few or processes == 1 or sys.platform != "linux":  # other systems cannot fork a process
        yield from map(job, chunks)
    else:
        yield from _in_parallel(job, chunks, processes)


def _in_parallel(job: Job, chunks: Iterable[Sequence[Unparsed]], processes: int) -> Iterator[Chunk]:
    """Limits the chunks in flight to what keeps the processes busy, so memory does not grow with the source."""
    fork = get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=fork, initializer=_begin, initargs=(job, os.getpid()))
    under_way: deque[Future[Chunk]] = deque()
    workers: set[BaseProcess] = set()
    try:
        for rows in chunks:
            under_way.append(
                pool.submit(_work, [(row.where, row.text) if isinstance(row, JsonLine) else row for row in rows])
            )
            workers = workers or set(active_children())  # the first chunk starts all of them
            if len(under_way) > 2 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        pool.shutdown(cancel_futures=True)  # waits until all have ended
        if any(worker.exitcode == -KILLED_BY for worker in workers):
            raise ModelError(
                f"the chat template ran for more than {KILLED_SECONDS:g} s in one step",
                remedy="set model.chat_template=chatml, or path:FILE of another template",
            ) from error
        raise StageError(
            "a process that tokenised rows died", remedy="check whether memory ran out, then run the stage again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: Job


def _begin(job: Job, parent: int) -> None:
    """Prepares a forked process, which has the job already. It ends with its parent, so only the parent gets
    signals."""
    global _job
    _job = job
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # the parent's objects, hundreds of thousands, need not be looked at again and again
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone. A killed parent cannot do so, and its children would hold its
    locks."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


_Packed = tuple[str, bytes] | Unparsed
"""A line as a tuple, which crosses to another process in a fraction of the time of a dataclass."""


def _work(rows: Sequence[_Packed]) -> Chunk:
    return _job([JsonLine(where=row[0], text=row[1]) if isinstance(row, tuple) else row for row in rows])
