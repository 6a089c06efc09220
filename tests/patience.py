"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, seconds: float = 60.0, error: Callable[[], str] = str) -> None:
    """Returns once the condition holds.

    Raises:
        AssertionError: it does not hold after so many seconds; ``error`` gives its message.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, error()
        time.sleep(0.05)
