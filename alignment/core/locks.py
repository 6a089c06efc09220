"""Locks that a dead process cannot leave behind: the kernel holds them while a descriptor is open."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignment.core.errors import ArtifactError, Busy, ConfigError

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""Errors of file systems without locks: some network file systems, Lustre without ``flock``."""
_COMMAND_CHARACTERS = 200
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 1.0
"""How long to wait for a process that only looks at a lock (``is_held``), which takes microseconds."""


@contextmanager
def held(
    path: Path, *, wait: bool, waiting: Callable[[], None] | None = None, remedy: str = "wait for it, or stop it"
) -> Iterator[int]:
    """Holds the lock file ``path`` while the block runs; yields its descriptor. With ``wait``, ``waiting`` is called
    twice a second while another process holds it, so that a wait is not taken for a hang. A child process that inherits
    the descriptor holds the lock as long as it lives, even if this process is killed. Raises Busy: another process
    holds it and ``wait`` is False. The message names that process, and says after ``remedy`` how to see and stop it;
    ConfigError: the file system does not support locks; ArtifactError: ``path`` is something else, such as a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        while wait and waiting is not None and not _had_at_once(descriptor, path):
            waiting()
            time.sleep(_POLL_SECONDS)
        if not (_lock(descriptor, fcntl.LOCK_EX, path) if wait else _had_at_once(descriptor, path)):
            holder, commands = _holder(descriptor, path)
            advice = "; ".join(filter(None, (remedy, commands)))
            raise Busy(f"in use by {holder}", where=str(path.parent), remedy=advice)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now. It only needs to read the file, so it works on runs of other users too.
    Raises ConfigError: the file system does not support locks."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, path)
    finally:
        os.close(descriptor)


def last_host(path: Path) -> str:
    """The machine of the process that holds the lock or held it last; empty if it is not known."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        return _taker(descriptor)[1]
    finally:
        os.close(descriptor)


def _had_at_once(descriptor: int, path: Path) -> bool:
    """Takes the lock if no other process holds it. A process that only looks at it shares it for a moment."""
    deadline = time.monotonic() + _LOOK_SECONDS
    while not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path):
        is_taken = not _lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, path)
        if is_taken or time.monotonic() > deadline:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(0.001)
    return True


def _lock(descriptor: int, how: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"this file system does not support locks ({error.strerror}); without them two runs could write one result",
            where=str(path.parent),
            remedy="use one that does, with output=FOLDER for runs or ALIGNMENT_CACHE=FOLDER for models; some "
            "network file systems have an option for locks (Lustre: mount with -o flock)",
        ) from None
    return True


def _holder(descriptor: int, path: Path) -> tuple[str, str]:
    """The process that holds the lock: the one that took it, or one that inherited its descriptor. Also the commands
    that show and stop it; "" if its id is not known."""
    taker, host = _taker(descriptor)
    if not taker.isdigit():
        return f"process {taker or 'unknown'}", ""
    if host and host != socket.gethostname():
        return f"process {taker} on {host}", f"on {host}, {_commands(taker)}"
    if _is_running(int(taker)):
        return f"process {taker}", _commands(taker)
    heir = _heir(path)
    if heir is None:
        return f"process {taker}", ""
    pid, command = heir
    name = f"process {pid} ({command})" if command else f"process {pid}"
    ended = f"which is still running although {taker}, the process that started it, has ended"
    return f"{name}, {ended}", _commands(pid)


def _taker(descriptor: int) -> tuple[str, str]:
    taker, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
    return taker, host


def _commands(pid: int | str) -> str:
    return f"`ps -fp {pid}` shows it, `kill {pid}` stops it"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _heir(path: Path) -> tuple[int, str] | None:
    """Id and command of another process that has the file open, as far as this user may see. A process has no command
    for a moment while it starts a program."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(Path(file.path) == path for file in process.open_files()):
                return process.pid, shlex.join(process.cmdline())[:_COMMAND_CHARACTERS]
    return None


def _open(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise ArtifactError("a lock must be a regular file, not a link", where=str(path), remedy="remove it")
