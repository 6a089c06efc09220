"""Being asked to stop: by SIGTERM, by a terminal that closes, or by the user."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


class Terminated(BaseException):
    """The driver itself was asked to stop, by SIGTERM or by its terminal closing."""


@contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP become an exception, so that a stage is asked to save before this process goes."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
