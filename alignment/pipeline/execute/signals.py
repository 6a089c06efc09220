"""Requests to stop: by SIGTERM or SIGUSR1, by a terminal that closes, or by the user."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from alignment.core.errors import PREEMPTED

INTERRUPTED = 130


class Terminated(BaseException):
    """The driver itself was asked to stop, by SIGTERM, SIGUSR1 or its terminal closing."""


_NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class _RaiseOnce:
    """A handler that ignores all signals of ``taken`` from the first one on, which it raises as an exception."""

    def __init__(self, taken: Sequence[int]) -> None:
        self.taken = taken
        self.number: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.number = number
        for each in self.taken:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM, SIGUSR1 and SIGHUP into an exception, so that a stage is asked to save before this process ends,
    and no process that it started outlives it. Python lets only the main thread handle signals; in another thread they
    keep their handlers. SIGHUP stays ignored if it was, as under nohup. After the first of these signals all are
    ignored until the outermost of these blocks ends: schedulers repeat theirs, and a sweep hands on what its trials
    have got already. The second must not interrupt what the first began; Ctrl-C still does. In a process of
    ``exit_with`` they are ignored for good, and so is a SIGHUP everywhere, because shell and terminal both send it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None is the handler of a C library around Python, which could not be restored.
    taken = [number for number in _NUMBERS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    own = _RaiseOnce(taken)
    before = {number: signal.signal(number, own) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            if own.number is not None and isinstance(handler, _RaiseOnce):  # the outer block ends next
                handler.number = own.number
            elif own.number is None or not (handler is _end or own.number == number == signal.SIGHUP):
                signal.signal(number, handler)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code of ``main``, or with that of a requested stop, whenever a signal arrives.
    Outside a block of ``termination_raises``, a signal ends the process at once; after ``main`` signals are ignored,
    because Python takes its handlers away while it ends. Those that were ignored stay so."""
    taken = [number for number in _NUMBERS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    code = main()
    for number in taken:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _end(_: int, __: FrameType | None) -> None:
    os._exit(PREEMPTED)


def acknowledgement(stop: BaseException) -> str:
    """What to print at once after an interruption, because the current step may take long."""
    again = "; press Ctrl-C again to end it at once without saving" if isinstance(stop, KeyboardInterrupt) else ""
    return f"stopping: the stage will finish its step, save and end{again}"
