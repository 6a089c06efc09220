"""A bound on the time of somebody else's template, which may loop for ever over a row.

It counts the processor's time, so that a busy machine or one that slept changes nothing. What runs in Python is stopped
by an exception. What runs in C, such as a sum over a long list, hears of no exception; then the process is ended.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RENDERING_SECONDS = 10.0
"""Of the processor, for one rendering; that of a long conversation takes some milliseconds."""
KILLED_SECONDS = 30.0
"""Of the processor without a step of Python in between."""
KILLED_BY = signal.SIGVTALRM
_LOOK_EVERY = 1.0
_AGAIN = 2.0


_end: float | None = None
"""When the rendering that is under way is late, in seconds of the main thread."""
_late: Exception
_is_watched = False


@contextmanager
def watched() -> Iterator[None]:
    """Sets the timers for all that is ``Bounded`` in the block, which costs more than a rendering does.

    Signals reach the main thread alone, so nothing is bounded in another one.
    """
    global _is_watched
    if _is_watched or not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _look)
    _is_watched = True
    try:
        every = min(RENDERING_SECONDS, _LOOK_EVERY)
        signal.setitimer(signal.ITIMER_PROF, every, every)
        signal.setitimer(signal.ITIMER_VIRTUAL, KILLED_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGPROF, before)
        _is_watched = False


class Bounded:
    """Raises ``late`` in the block once it has computed for ``RENDERING_SECONDS``."""

    __slots__ = ("_late", "_timers")

    def __init__(self, late: Exception) -> None:
        self._late = late
        self._timers = watched() if not _is_watched else None

    def __enter__(self) -> None:
        """Begins to count."""
        global _end, _late
        if self._timers is not None:
            self._timers.__enter__()
        if _in_main_thread():
            _late, _end = self._late, time.thread_time() + RENDERING_SECONDS

    def __exit__(self, *raised: object) -> None:
        """Counts no more."""
        global _end
        if _in_main_thread():
            _end = None
        if self._timers is not None:
            self._timers.__exit__(None, None, None)


def _look(_: int, __: FrameType | None) -> None:
    global _end
    signal.setitimer(signal.ITIMER_VIRTUAL, KILLED_SECONDS)  # Python still runs
    now = time.thread_time()
    if _end is not None and now >= _end:
        _end = now + _AGAIN  # a callback may swallow it; and Jinja needs a while to rewrite its traceback
        raise _late


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
