"""Which signals ask a stage to stop, and how one that has only begun to import its libraries does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from alignment.core.errors import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def stop_while_importing(write_status: Callable[[], None]) -> None:
    """Until the stage has handlers of its own, a signal ends it at once, and as one that was asked to stop."""

    def on_signal(_: int, __: FrameType | None) -> None:
        try:
            write_status()
        finally:
            os._exit(PREEMPTED)  # an exception would end up inside an import

    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launchers are started deaf to SIGUSR1 (processes.py)


def ignore() -> None:
    """From here on the process ends by itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
