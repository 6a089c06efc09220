"""Sends to a tracker's server from a thread, so that a training waits for no server.

The thread works through a queue. While the server does not answer, it tries again, more and more rarely. At the end of
a stage it has a bounded time; what was not sent by then is in the stage's files, from which ``align track`` sends it.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.core.artifacts import Manifest
from alignment.training.trackers.tracker import Cell, Row, Tracker

log = logging.getLogger(__name__)

END_SECONDS = 60.0
"""How long the end of a stage waits at most until everything is sent."""
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 30.0
_ROWS_AT_ONCE = 500


class NotSentError(Exception):
    """The server lacks something of the stage."""


def _nothing(_: Tracker) -> None:
    """The first task, so that the server learns of a stage before its first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """Something to be sent: a step, or else a call."""

    row: Row | None = None
    call: Callable[[Tracker], None] = _nothing


class Sender(Tracker):
    """A tracker that forwards everything to the one that ``connect`` makes, in order, and repeats what failed.

    ``server`` names it in messages. ``connect`` is called in the thread. ``may_pass`` says whether an exception may be
    gone at the next attempt, as that of an unreachable server. After any other one nothing more is sent, and the next
    method that is called raises NotSentError. The tracker has to bear that a call is repeated whose answer was lost.
    """

    def __init__(
        self,
        server: str,
        connect: Callable[[], Tracker],
        *,
        may_pass: Callable[[Exception], bool],
        end_seconds: float = END_SECONDS,
    ) -> None:
        self._server = server
        self._connect = connect
        self._may_pass = may_pass
        self._end_seconds = end_seconds
        self._tasks: deque[_Task] = deque([_Task()])
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._failure: Exception | None = None
        self._unreachable = False
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, rows: Sequence[Row]) -> None:
        """Queues steps."""
        self._add(*(_Task(row=row) for row in rows))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Queues a table."""
        self._add(_Task(call=lambda tracker: tracker.table(name, columns, rows)))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Queues the result."""
        self._add(_Task(call=lambda tracker: tracker.result(manifest, folder)))

    def close(self, *, done: bool) -> None:
        """Waits until everything is sent, but not for a server that does not answer.

        Raises:
            NotSentError: something was not sent; the message says which steps.
        """
        self._add(_Task(call=lambda tracker: tracker.close(done=done)))
        self._ending.set()
        self._thread.join(self._end_seconds)
        with self._changed:
            unsent = list(self._tasks)
        if unsent:
            why = self._failure or f"not sent within {self._end_seconds:g} seconds"
            raise NotSentError(f"{self._server} is missing {_described(unsent)}: {why}") from self._failure

    def _add(self, *tasks: _Task) -> None:
        if self._failure is not None:
            raise NotSentError(f"{self._server} refused: {self._failure}") from self._failure
        with self._changed:
            self._tasks.extend(tasks)
            self._changed.notify()

    def _work(self) -> None:
        """Sends until the task that closes is done, or an exception will not pass."""
        tracker: Tracker | None = None
        delay = _FIRST_DELAY
        while batch := self._next():
            try:
                tracker = tracker or self._connect()
                rows = [task.row for task in batch if task.row is not None]
                if rows:
                    tracker.log(rows)
                else:
                    batch[0].call(tracker)
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                if self._ending.is_set() or not self._may_pass(error):
                    self._failure = error
                    return
                self._warn_once(error)
                self._ending.wait(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                delay = _FIRST_DELAY
                self._sent(batch)

    def _next(self) -> list[_Task]:
        """The steps that are first in the queue, or the one other task; it waits for one. Empty once all is done."""
        with self._changed:
            while not self._tasks:
                if self._ending.is_set():
                    return []
                self._changed.wait(1.0)
            steps = itertools.takewhile(lambda task: task.row is not None, self._tasks)
            return list(itertools.islice(steps, _ROWS_AT_ONCE)) or [self._tasks[0]]

    def _sent(self, batch: Sequence[_Task]) -> None:
        with self._changed:
            for _ in batch:
                self._tasks.popleft()
        if self._unreachable:
            self._unreachable = False
            log.warning("%s is answering again", self._server)

    def _warn_once(self, error: Exception) -> None:
        if not self._unreachable:
            self._unreachable = True
            log.warning(
                "%s cannot be reached. The stage continues, its steps are in metrics.jsonl, and sending will be "
                "retried: %s",
                self._server,
                error,
            )


def _described(tasks: Sequence[_Task]) -> str:
    steps = [task.row.step for task in tasks if task.row is not None]
    return f"steps {steps[0]} to {steps[-1]} and everything after them" if steps else "the end of the stage"
