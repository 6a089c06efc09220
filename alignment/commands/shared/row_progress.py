"""How far a reading of many rows is: one line that is replaced on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.status import Status

from alignment.pipeline.execute.durations import duration

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
    """Shows the number of rows read, the pace, and how long the rest takes if ``total`` knows the number of all rows.

    ``total`` is called once, when there is something to show.
    """

    def __init__(self, console: Console, total: Callable[[], int | None], clock: Clock = time.monotonic) -> None:
        self._console = console
        self._count_all = total
        self._total: int | None = None
        self._clock = clock
        self._began = clock()
        self._next = self._began + QUIET_SECONDS
        self._status: Status | None = None
        self._is_shown = False

    def __call__(self, rows: int) -> None:
        """``rows`` have been read."""
        if rows % _EVERY_ROWS or self._clock() < self._next:
            return
        if not self._is_shown:
            self._is_shown = True
            self._total = self._count_all()
        self._show(self._line(rows))
        self._next = self._clock() + _EVERY_SECONDS[self._console.is_terminal]

    def watched(self, rows: Iterable[T]) -> Iterator[T]:
        """The same rows; each is shown when the next one is asked for."""
        try:
            for number, row in enumerate(rows, start=1):
                yield row
                self(number)
        finally:
            self.end()

    def _line(self, rows: int) -> str:
        """``3,120,000 of 10,000,000 rows, 21,400 rows/s, 5 min 22 s left``."""
        pace = rows / max(self._clock() - self._began, 1e-9)
        parts = [
            f"{rows:,} rows" if self._total is None else f"{rows:,} of {self._total:,} rows",
            f"{pace:,.0f} rows/s",
        ]
        if self._total is not None:
            parts.append(f"{duration(max(0, self._total - rows) / pace)} left")
        return ", ".join(parts)

    def _show(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        if self._status is None:
            self._status = self._console.status(line)
            self._status.start()
        self._status.update(line)

    def end(self) -> None:
        """Removes the line from a terminal."""
        if self._status is not None:
            self._status.stop()


class StopAfterRow:
    """Is True once the user has pressed Ctrl-C; a second time interrupts at once."""

    def __init__(self) -> None:
        self._is_asked = False

    def __bool__(self) -> bool:
        return self._is_asked

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        if self._is_asked:
            signal.default_int_handler(number, frame)
        self._is_asked = True


@contextmanager
def stop_after_row() -> Iterator[StopAfterRow]:
    """Ctrl-C lets the row end that is being read, so that what was learned of the rows before it is whole."""
    stop = StopAfterRow()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
