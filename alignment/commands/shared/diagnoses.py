"""Reads a data file as `align doctor` does: which records stages can make of it, with progress on the way."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.status import Status

from alignment.config.data import SourceConfig
from alignment.core.terminal import Terminal
from alignment.core.wording import duration
from alignment.data import records as record_types
from alignment.data.doctor import Diagnosis, examine
from alignment.data.reading import count_rows
from alignment.data.records import HeldOutPrompt, Prompt, Record
from alignment.data.source_files import locate
from alignment.pipeline.sources import data_sources
from alignment.stages.registry import kinds

QUIET_SECONDS = 3.0
"""A reading that takes less prints nothing."""
_EVERY_SECONDS = {True: 0.5, False: 30.0}
"""Seconds between looks on a terminal, and between lines elsewhere."""
_EVERY_ROWS = 256
"""Rows between looks at the clock."""

T = TypeVar("T")
Clock = Callable[[], float]
"""Seconds that only go up."""


class RowProgress:
    """Shows the number of rows read, the pace, and how long the rest takes if ``total`` knows the number of all rows:
    ``3,120,000 of 10,000,000 rows, 21,400 rows/s, 5 min 22 s left``. ``total`` is called once, when there is something
    to show."""

    def __init__(self, console: Console, total: Callable[[], int | None], clock: Clock = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._count_all = functools.cache(total)
        self._began = clock()
        self._next = self._began + QUIET_SECONDS
        self._status: Status | None = None

    def __call__(self, rows: int) -> None:
        if rows % _EVERY_ROWS or self._clock() < self._next:
            return
        total, pace = self._count_all(), rows / max(self._clock() - self._began, 1e-9)
        of_all = "" if total is None else f" of {total:,}"
        left = "" if total is None else f", {duration(max(0, total - rows) / pace)} left"
        line = f"{rows:,}{of_all} rows, {pace:,.0f} rows/s{left}"
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._status is None:
            self._status = self._console.status(line)
            self._status.start()
        else:
            self._status.update(line)
        self._next = self._clock() + _EVERY_SECONDS[self._console.is_terminal]

    def watched(self, rows: Iterable[T]) -> Iterator[T]:
        """The same rows; each is shown when the next one is asked for."""
        try:
            for number, row in enumerate(rows, start=1):
                yield row
                self(number)
        finally:
            self.end()

    def end(self) -> None:
        """Removes the line from a terminal."""
        if self._status is not None:
            self._status.stop()


@contextmanager
def stop_after_row() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the row end that is being read, so that what was learned of the rows before it is whole. Whether it
    was pressed is yielded as a function; a second time interrupts at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


_FIRST: tuple[type[Record], ...] = (
    record_types.PreferencePair,
    record_types.LabelledAnswer,
    record_types.Conversation,
    HeldOutPrompt,
    Prompt,
    record_types.PlainText,
)
"""Records by how much of a row they need, the one that needs most first."""


def records() -> dict[str, type[Record]]:
    """The record types that stages make of a row, by the names of the stages that share a type."""
    names: dict[type[Record], list[str]] = {}
    for kind in kinds().values():
        for slot in kind.data(kind.config()):
            if slot.record not in names or (kind.trains and slot.field == "data"):
                names.setdefault(slot.record, []).append(kind.name)
    return {", ".join(stages): record for record, stages in names.items()}


def best_use(diagnosis: Diagnosis) -> tuple[str, type[Record]] | None:
    """The record that a file is most of all meant for, after the names of its stages; None if no stage can use it."""
    meant_for = {diagnosis.uses[stages].record: stages for stages in diagnosis.meant_for}
    return next(((meant_for[record], record) for record in _FIRST if record in meant_for), None)


def path_of(source: str, *, where: str, announce: Callable[[str], None]) -> Path:
    """The file or folder of a source; a hub's data set that is not on this machine is downloaded. Raises DataError."""
    if not source.startswith("hub:"):
        return locate(source if ":" in source else f"path:{source}", where=where)
    path = data_sources.fetch(data_sources.resolve(source, where=where), announce=announce).path
    assert path is not None, "fetched data has a path"
    return path


def progress_of(console: Console, path: Path, data: SourceConfig) -> RowProgress:
    """Progress through the rows of a source."""
    return RowProgress(console if console.is_terminal else Terminal(stderr=True), lambda: count_rows(path, data))


def examined(console: Console, path: Path, data: SourceConfig) -> tuple[Diagnosis, bool]:
    """What the rows are, and whether all have been read; Ctrl-C ends the reading after a row. Raises DataError."""
    progress = progress_of(console, path, data)
    try:
        with stop_after_row() as is_stopped:

            def on_row(diagnosis: Diagnosis) -> bool:
                progress(diagnosis.rows)
                return not is_stopped()

            diagnosis = examine(path, data, records(), go_on=on_row)
            return diagnosis, not is_stopped()
    finally:
        progress.end()
