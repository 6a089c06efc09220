"""Requests to stop: by SIGTERM or SIGUSR1, by a terminal that closes, or by the user."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


class Terminated(BaseException):
    """The driver itself was asked to stop, by SIGTERM, SIGUSR1 or its terminal closing."""


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM, SIGUSR1 and SIGHUP into an exception, so that a stage is asked to save before this process ends,
    and no process that it started outlives it.

    Python lets only the main thread handle signals; in another thread they keep their handlers. SIGHUP stays ignored if
    it was, as under nohup. After the first of these signals all are ignored until the block ends: schedulers repeat
    theirs, and a sweep hands on what its trials have got already. The second must not interrupt what the first began;
    Ctrl-C still does. A SIGHUP is ignored for good, because shell and terminal both send it.
    """
    hung_up = False

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal hung_up
        hung_up = number == signal.SIGHUP
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    # None is the handler of a C library around Python, which could not be restored.
    taken = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, on_signal) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            if not (hung_up and number == signal.SIGHUP):
                signal.signal(number, handler)


def acknowledgement(stop: BaseException) -> str:
    """What to print at once after an interruption, because the current step may take long."""
    again = "; press Ctrl-C again to end it at once without saving" if isinstance(stop, KeyboardInterrupt) else ""
    return f"stopping: the stage will finish its step, save and end{again}"
