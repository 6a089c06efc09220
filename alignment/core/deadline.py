"""A time limit for input that computes: a template's loops, a recipe's interpolations. It counts processor time, so a
busy or suspended machine changes nothing. Python code is stopped by an exception. C code, such as a sum over a long
list, cannot be interrupted by an exception; then the process is killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 10.0
"""Processor time for one block; a template takes milliseconds for a long conversation."""
KILLED_SECONDS = 30.0
"""Processor time without a single Python instruction."""
KILLED_BY = signal.SIGVTALRM
_LOOK_EVERY = 1.0
_AGAIN = 2.0


_end: float | None = None
"""Deadline of the current block, in processor seconds of the main thread."""
_is_watched = False


@contextmanager
def watched() -> Iterator[None]:
    """Sets the timers once for all ``Bounded`` blocks inside; setting them costs more than rendering a row. Signals
    reach only the main thread, so nothing is bounded in other threads."""
    global _is_watched
    if _is_watched or not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _look)
    _is_watched = True
    try:
        every = min(SECONDS, _LOOK_EVERY)
        signal.setitimer(signal.ITIMER_PROF, every, every)
        signal.setitimer(signal.ITIMER_VIRTUAL, KILLED_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        # None: the handler of a C library, which Python cannot restore; the default would end the process at the next
        # signal
        signal.signal(signal.SIGPROF, signal.SIG_IGN if before is None else before)
        _is_watched = False


class _Late(BaseException):
    """A BaseException, so that no ``except Exception`` in the block can swallow or replace it."""


class Bounded:
    """Raises ``late`` in the block once it has computed for ``SECONDS``."""

    __slots__ = ("_late", "_timers")

    def __init__(self, late: Exception) -> None:
        self._late = late
        self._timers = watched() if not _is_watched else None

    def __enter__(self) -> None:
        global _end
        if self._timers is not None:
            self._timers.__enter__()
        if _in_main_thread():
            _end = time.thread_time() + SECONDS

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _end
        if _in_main_thread():
            _end = None
        if self._timers is not None:
            self._timers.__exit__(None, None, None)
        if kind is _Late:
            raise self._late


def _look(_: int, __: FrameType | None) -> None:
    global _end
    signal.setitimer(signal.ITIMER_VIRTUAL, KILLED_SECONDS)  # Python still runs
    now = time.thread_time()
    if _end is not None and now >= _end:
        _end = now + _AGAIN  # a callback may swallow it; and Jinja needs a while to rewrite its traceback
        raise _Late


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
