"""The children of a process, also where /proc hides the processes of other users (``hidepid``)."""

from __future__ import annotations

from contextlib import suppress

import psutil


def children_of(process: psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    """The children that this user may see, or all descendants; none if the process has ended."""
    try:
        return list(process.children(recursive=recursive))
    except psutil.NoSuchProcess:
        return []
    except psutil.AccessDenied:  # psutil asks every process for its parent, and gives up at the first refusal
        return _visible_children(process, recursive=recursive)


def _visible_children(process: psutil.Process, *, recursive: bool) -> list[psutil.Process]:
    children: dict[int, list[psutil.Process]] = {}
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            children.setdefault(other.ppid(), []).append(other)
    result = children.get(process.pid, [])
    for child in result if recursive else ():  # which grows meanwhile
        result += children.get(child.pid, [])
    return result
