"""The signals that ask a stage to stop, and how a stage stops while it still imports its libraries."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from alignment.core.errors import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def stop_while_importing(write_status: Callable[[], None]) -> None:
    """Until the stage installs its own handlers, a signal ends it at once, with the status of a requested stop."""

    def on_signal(_: int, __: FrameType | None) -> None:
        try:
            write_status()
        finally:
            os._exit(PREEMPTED)  # an exception would end up inside an import

    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launchers start with SIGUSR1 blocked


@contextmanager
def sigusr1_blocked() -> Iterator[None]:
    """Starts a launcher with SIGUSR1 blocked. The signal would kill a launcher, which does not handle it; workers take
    it as a request to stop. A process inherits the blocked signals of its parent; workers unblock this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """From here on the process ignores requests to stop, because it is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
