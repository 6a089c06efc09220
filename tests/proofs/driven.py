"""The user's command in a process of its own, without the seconds that each would take to import the libraries.

A server that has imported everything, and computed nothing, is forked for every driver; a driver forks its stage where
it would start a launcher. Everything else is the driver's and the worker's own: locks, signals, logs, hang detection.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Read when torch is imported, which the server does for all."""
PRELOADED = (
    "tests.proofs.driven",
    "alignment.worker",
    "alignment.stages.shared.language_model",
    "alignment.pipeline.execute.run",
)
_OFTEN = 0.02
"""Seconds between two looks at a stage, where the clock is set in between."""
_STANDARD = 3
"""File descriptors below this are stdin, stdout and stderr."""


class Driver:
    """``align`` with these arguments, under way. What it prints goes to ``printed``.

    Where ``clock`` is given, the driver's wall clock is ahead by the seconds that this file holds.
    """

    def __init__(self, arguments: Sequence[str], printed: Path, *, clock: Path | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._process = context.Process(target=_drive, args=(list(arguments), str(printed), clock and str(clock)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit code, negative for a signal.

        Raises:
            TimeoutError: it did not end in time; it is killed.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"the command did not end in {seconds:g} s")
        return self._process.exitcode


def _drive(arguments: list[str], printed: str, clock: str | None) -> NoReturn:
    with open(printed, "ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from alignment import cli
    from alignment.pipeline.backends import processes

    real = time.time
    processes.psutil.Popen = lambda *args, **more: _forked(*args, **more, clock=real)
    if clock is not None:
        processes._POLL_SECONDS = _OFTEN
        time.time = lambda: real() + float(Path(clock).read_text(encoding="utf-8") or 0)
    code = cli.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def _forked(
    argv: Sequence[str], *, env: dict[str, str], stdout: Any, pass_fds: Sequence[int], clock: Any, **_: Any
) -> Any:
    """In place of a launcher: a child with a session, an environment and descriptors as an executed one would have."""
    child = os.fork()
    if child:
        return psutil.Process(child)
    code = 1
    try:
        time.time = clock
        os.setsid()
        os.dup2(stdout.fileno(), 1)
        os.dup2(stdout.fileno(), 2)
        for number in _open_descriptors() - set(pass_fds):
            with suppress(OSError):
                os.close(number)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        from alignment import worker
        from alignment.core.terminal import make_unfailing

        make_unfailing()
        code = worker.main(Path(argv[-1]))
    except BaseException:  # noqa: BLE001  nothing may go on in the parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if int(name) >= _STANDARD}
