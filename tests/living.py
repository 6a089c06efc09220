"""Processes that may end at any moment, also between two questions about them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO

import psutil


def is_living(process: psutil.Process | int) -> bool:
    """Whether a process, or the one with this id, still runs; a zombie does not."""
    try:
        known = psutil.Process(process) if isinstance(process, int) else process
        return bool(known.is_running() and known.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants_of(process: psutil.Process | int) -> list[psutil.Process]:
    """Its descendants; none if it has ended."""
    with suppress(psutil.NoSuchProcess):
        known = psutil.Process(process) if isinstance(process, int) else process
        return list(known.children(recursive=True))
    return []


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; empty if it has ended, or is another user's."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def kill_each(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to those that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until(condition: Callable[[], object], *, seconds: float = 60.0, error: Callable[[], str] = str) -> None:
    """Returns once the condition holds. Raises AssertionError: it does not hold after so many seconds; ``error`` gives
    its message."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, error()
        time.sleep(0.05)


def in_child(work: Callable[[], int], sink: IO[bytes] | None = None) -> int:
    """The exit code of ``work`` in a process of its own, which prints into ``sink``."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if sink is not None:
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        # pytest's are other files than these two.
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  nothing may go on in the parent's code
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
