"""Runs a command to its end, watches its processes, and lets none of them outlive the call."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from alignment.core import hardware
from alignment.core.child_processes import SIGNALS, children_of, kill_all, sigusr1_blocked
from alignment.core.errors import AlignmentError
from alignment.core.terminal import shorten
from alignment.pipeline.backends.command import Command, complete, of_worker
from alignment.pipeline.backends.forking import ForkedProcess, ForkServer

_POLL_SECONDS = 0.5
_CALL_GRACE_SECONDS = 2.0
_NOT_FORKED = b"imports its libraries itself: the run's fork server has ended, hangs, or has another environment\n"


def call(argv: Sequence[str]) -> int:
    """Runs a program of the worker's side on this terminal, with all cores; returns its exit code. No process of the
    program outlives this call. After an interruption it has ``_CALL_GRACE_SECONDS`` to end."""
    variables = of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", ""))
    with _signals_deferred() as arrived:
        program = psutil.Popen(argv, env=complete(variables))
    tree = _ProcessTree(program, is_launcher=False)
    try:
        for number in arrived:
            signal.raise_signal(number)
        while (code := _exit_code(program)) is None:
            tree.look()
        return code
    except BaseException as stop:
        if not isinstance(stop, KeyboardInterrupt):  # the terminal has sent Ctrl-C to the program too
            tree.ask_to_stop()
        tree.wait(_CALL_GRACE_SECONDS)
        raise
    finally:
        tree.kill()


def execute(
    command: Command,
    *,
    log: Path,
    on_poll: Callable[[], None],
    grace_seconds: float,
    on_stop: Callable[[BaseException], None] = lambda _: None,
    keep_open: Sequence[int] = (),
    server: ForkServer | None = None,
) -> int:
    """Runs a command in a session of its own; returns its exit code, negative for a signal. Its output is appended to
    ``log``, of which a long one loses its middle. If this call is interrupted, ``on_stop`` is called, the workers are
    asked to stop and are killed after ``grace_seconds``, and the interruption is raised again. No process of the
    command outlives this call. ``on_poll`` is called twice a second; if it raises an AlignmentError, the workers are
    killed at once. Descriptors in ``keep_open``, and their locks, stay open in the command. The ``server`` forks a
    command without a launcher."""
    with log.open("ab") as sink, _signals_deferred() as arrived:
        forked = None
        if server is not None:
            gives_up = functools.partial(bool, arrived)
            forked = server.start(command, output=sink.fileno(), keep_open=keep_open, gives_up=gives_up)
            if forked is None and command.module:
                sink.write(_NOT_FORKED)
                sink.flush()
        leader = forked or _executed(command, sink, keep_open)
    tree = _ProcessTree(leader, is_launcher=not command.module)
    try:
        for number in arrived:
            signal.raise_signal(number)
        while (code := _exit_code(leader)) is None:
            tree.look()
            shorten(log)
            on_poll()
        if -code in SIGNALS and not command.module:  # only the launcher was asked; its workers do not know yet
            tree.ask_to_stop()
            tree.wait(grace_seconds)
        return code
    except AlignmentError:
        raise
    except BaseException as stop:
        tree.ask_to_stop()
        with suppress(OSError, SystemExit):  # the terminal may be closed; the worker saves all the same
            on_stop(stop)
        tree.wait(grace_seconds)
        raise
    finally:
        tree.kill()
        shorten(log)


def _executed(command: Command, sink: BinaryIO, keep_open: Sequence[int]) -> psutil.Popen:
    with sigusr1_blocked():
        return psutil.Popen(
            command.argv,
            env=complete(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
        )


@contextmanager
def _signals_deferred() -> Iterator[list[int]]:
    """Collects signals that arrive while a process starts, because an exception from their handlers would leave that
    process running without a parent that knows it."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread has handlers
        yield arrived
        return
    taken = [number for number in SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in taken}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(leader: psutil.Popen | ForkedProcess) -> int | None:
    try:
        return int(leader.wait(timeout=_POLL_SECONDS))
    except psutil.TimeoutExpired:
        return None


class _ProcessTree:
    """A process and its descendants. If it is a launcher, its children are workers, found even after it died."""

    def __init__(self, leader: psutil.Process, *, is_launcher: bool) -> None:
        self._leader, self._is_launcher = leader, is_launcher
        self._known: dict[int, psutil.Process] = {}

    def look(self) -> None:
        for process in children_of(self._leader, recursive=True):
            self._known.setdefault(process.pid, process)

    def ask_to_stop(self) -> None:
        """SIGTERM to the workers alone: a launcher that got it would end, or give its workers little time to save."""
        self.look()
        for process in self._workers():
            with suppress(psutil.NoSuchProcess):
                process.terminate()

    def _workers(self) -> list[psutil.Process]:
        if not self._is_launcher:
            return [self._leader]
        return children_of(self._leader) or list(self._known.values()) or [self._leader]

    def wait(self, seconds: float) -> None:
        """Returns when all have ended, or after ``seconds``; a second interruption ends the wait."""
        deadline = time.monotonic() + seconds
        while self._alive() and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)

    def kill(self) -> None:
        """Kills the processes that are left, and collects the launcher's exit code."""
        kill_all(self._alive)
        self._leader.wait()

    def _alive(self) -> list[psutil.Process]:
        return [process for process in [self._leader, *self._known.values()] if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
