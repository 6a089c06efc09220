"""Runs a command to its end, watches its processes, and lets none of them outlive the call."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from alignment.core import hardware
from alignment.core.errors import AlignmentError
from alignment.core.logs import shorten
from alignment.core.stop_requests import SIGNALS
from alignment.pipeline.backends import environment
from alignment.pipeline.backends.command import Command

_POLL_SECONDS = 0.5


def call(argv: Sequence[str]) -> int:
    """Runs a program of the worker's side on this terminal, with all cores; returns its exit code."""
    variables = environment.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(argv, env={**os.environ, **variables}, check=False).returncode


def _nothing(_: BaseException) -> None:
    """Nobody has to hear of an interruption."""


def execute(
    command: Command,
    *,
    log: Path,
    on_poll: Callable[[], None],
    grace_seconds: float,
    on_stop: Callable[[BaseException], None] = _nothing,
    keep_open: Sequence[int] = (),
) -> int:
    """Runs a command to its end, output appended to ``log``, of which beginning and end are kept where it gets long;
    returns its exit code, negative for a signal.

    The command has a session of its own, so that Ctrl-C reaches this process alone. If this call is interrupted (by
    Ctrl-C, or an exception raised in a signal handler), the workers are asked to stop, awaited for ``grace_seconds``,
    then killed; the interruption goes on. No process of the command outlives this call. ``on_poll`` is called twice a
    second; where it finds that they are lost and raises an AlignmentError, they are killed at once. ``on_stop`` is
    called with an interruption before the wait for it. Descriptors in ``keep_open`` stay open in the command, and locks
    with them.
    """
    with log.open("ab") as sink, _answered_later() as came, _deaf_launcher():
        leader = psutil.Popen(
            command.argv,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
        )
    family = _Family(leader)
    try:
        for number in came:
            signal.raise_signal(number)
        while (code := _exit_code(leader)) is None:
            family.look()
            shorten(log)
            on_poll()
        if -code in SIGNALS:  # the launcher alone was asked to stop, and its workers have yet to hear of it
            family.ask_to_stop()
            family.wait(grace_seconds)
        return code
    except AlignmentError:
        raise
    except BaseException as stop:
        family.ask_to_stop()
        with suppress(
            OSError, SystemExit
        ):  # a terminal that was closed takes no words, and the worker saves all the same
            on_stop(stop)
        family.wait(grace_seconds)
        raise
    finally:
        family.kill()
        shorten(log)


@contextmanager
def _deaf_launcher() -> Iterator[None]:
    """SIGUSR1 would kill a launcher, which knows nothing of it; workers take it as a request. A process that is started
    while a signal is blocked goes on to block it, and so do those that it starts; workers unblock it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _answered_later() -> Iterator[list[int]]:
    """Signals that come while a process starts; an exception of their handlers would leave it without anybody who knows
    of it."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's
        yield came
        return
    taken = [number for number in SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in taken}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(leader: psutil.Popen) -> int | None:
    """Waits a moment; None while it still runs."""
    try:
        return int(leader.wait(timeout=_POLL_SECONDS))
    except psutil.TimeoutExpired:
        return None


class _Family:
    """A launcher and all that it started, remembered so that workers are found even after their launcher died."""

    def __init__(self, leader: psutil.Process) -> None:
        self._leader = leader
        self._known: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Notes who is there now."""
        with suppress(psutil.NoSuchProcess):
            for process in self._leader.children(recursive=True):
                self._known.setdefault(process.pid, process)

    def ask_to_stop(self) -> None:
        """SIGTERM to the workers alone: a launcher that got it would end, or give its workers little time to save."""
        self.look()
        try:
            workers = self._leader.children()
        except psutil.NoSuchProcess:
            workers = []
        for process in workers or list(self._known.values()) or [self._leader]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()

    def wait(self, seconds: float) -> None:
        """Returns when all have ended, or after ``seconds``; a second interruption ends the wait."""
        deadline = time.monotonic() + seconds
        while self._alive() and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)

    def kill(self) -> None:
        """Ends whoever is left, and collects the launcher."""
        for process in self._alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._leader.wait()

    def _alive(self) -> list[psutil.Process]:
        return [process for process in [self._leader, *self._known.values()] if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    """A process that ended and was not collected by its parent does not count."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
