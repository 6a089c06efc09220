"""Processes that may end at any moment, also between two questions about them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

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
