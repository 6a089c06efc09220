"""The children of a process, also where /proc hides the processes of other users (``hidepid``), and their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

_TRACKER_SECONDS = 5.0
"""How long a resource tracker may take once the processes that it watches have ended."""


def children_of(process: psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    """The children that this user may see, or all descendants; none if the process has ended."""
    try:
        return list(process.children(recursive=recursive))
    except psutil.NoSuchProcess:
        return []
    except psutil.AccessDenied:  # psutil asks every process for its parent, and gives up at the first refusal
        return _visible_children(process, recursive=recursive)


def kill_all(living: Callable[[], list[psutil.Process]]) -> None:
    """Kills the processes that ``living`` returns, until it returns none.

    Python's resource trackers come last. Such a process removes the shared memory of processes that were killed, and
    ends by itself when it has done so.
    """
    deadline = time.monotonic() + _TRACKER_SECONDS
    while processes := living():
        spares_trackers = time.monotonic() < deadline
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if not (spares_trackers and _is_resource_tracker(process)):
                    process.kill()
        time.sleep(0.05)


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Also of a process without a command line, which is just being started and may become one."""
    words = process.cmdline()
    return not words or any("resource_tracker" in word for word in words)


def _visible_children(process: psutil.Process, *, recursive: bool) -> list[psutil.Process]:
    children: dict[int, list[psutil.Process]] = {}
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            children.setdefault(other.ppid(), []).append(other)
    result = children.get(process.pid, [])
    for child in result if recursive else ():  # which grows meanwhile
        result += children.get(child.pid, [])
    return result
