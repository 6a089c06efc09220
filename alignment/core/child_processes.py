"""Child processes, their environment, how they stop and end, and libraries that they need not import."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

from alignment.core.errors import PREEMPTED

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
    """Kills the processes that ``living`` returns, until it returns none. Python's resource trackers come last. Such a
    process removes the shared memory of processes that were killed, and ends by itself when it has done so."""
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


RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_ranks(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that is none of the caller's group. A launcher, or a cluster in each of its
    containers, sets ``RANKS`` for the caller. A process that inherited them would wait for others that nobody
    starts."""
    return {name: value for name, value in variables.items() if name not in RANKS}


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code, after its exit handlers have run and its output is written. The interpreter
    is not taken down. Native threads of libraries may still wait for its lock then (those of pyarrow do), and such a
    thread aborts the process: exit code -6 after everything went well (apache/arrow issue 34314)."""
    with suppress(Exception):  # a handler that fails prints why
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk, or a stream that was closed
            stream.flush()
    os._exit(code)


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


_BY_OTHERS = ("scipy", "mlflow", "trackio")
"""transformers imports scipy for a loss of object detection, and TRL imports trackers whether they are used or not."""
_WITH_RANKS = "deepspeed"
"""accelerate imports it for every trainer, and it needs a process group."""


def hide() -> None:
    """Makes libraries look absent to those that are imported next. This saves up to a second of a stage."""
    for name in _BY_OTHERS if "RANK" in os.environ else (*_BY_OTHERS, _WITH_RANKS):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # so importlib says that there is none


def show(*names: str) -> None:
    """Lets code that runs later import these, by default all: a user's scorer for example. DeepSpeed stays hidden."""
    for name in names or _BY_OTHERS:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
