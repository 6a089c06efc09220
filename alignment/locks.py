"""Locks that a dead process cannot leave behind: the kernel holds them for as long as a descriptor is open."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignment.errors import Busy


@contextmanager
def held(path: Path, *, wait: bool, remedy: str = "wait for it, or stop it") -> Iterator[int]:
    """Holds the lock file ``path`` while the block runs; yields its descriptor.

    A child process that is handed the descriptor keeps the lock for as long as it lives, even if this one is killed.

    Raises:
        Busy: another process holds it and ``wait`` is False; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(f"in use by process {_owner(descriptor)}", where=str(path.parent), remedy=remedy) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
