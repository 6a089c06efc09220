"""Keeps servers for as long as their owner lives: ``python -m alignment.engines.keeper_process FOLDER``. The owner
starts it with a pipe as its standard input. When that closes, because the owner closed it or ended in any way, even by
SIGKILL, the keeper ends the server with all its descendants and removes ``FOLDER``. It detaches from the owner's
process tree first, so that what ends the owner leaves it the time to clean up. A server cannot outlive the keeper: the
kernel kills it. While the keeper lives it holds ``FOLDER/keeper.lock``, so a folder that it could not remove, because
it was killed too, is recognised by the next owner. ``FOLDER/command-1.json`` has the first server's ``argv``,
``environment`` and ``log``. A ``command-2.json`` replaces that server by a second one, and so on. When server N ends by
itself, its exit code is in ``FOLDER/exit-N``."""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from alignment.core.child_processes import children_of, kill_all, without_ranks
from alignment.core.errors import AlignmentError
from alignment.core.files import write_text
from alignment.core.locks import held

NOT_STARTED = 127
"""The exit code of a program that could not be started, as a shell gives it; the reason stands behind it."""
GRACE_SECONDS = 5.0
"""How long a server may take to end by itself."""
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def pid_file(folder: Path) -> Path:
    """The file with the keeper's own process number."""
    return folder / "pid"


def lock_file(folder: Path) -> Path:
    """The file that the keeper holds a lock on for as long as it lives."""
    return folder / "keeper.lock"


def command_file(folder: Path, number: int) -> Path:
    """The file that starts a server."""
    return folder / f"command-{number}.json"


def exit_file(folder: Path, number: int) -> Path:
    """The file with the exit code of a server that ended by itself."""
    return folder / f"exit-{number}"


def main(folder: Path) -> None:
    """Detaches, keeps servers until the owner has gone, and cleans up."""
    if detached := os.fork():
        pid_file(folder).write_text(str(detached))
        os._exit(0)  # the owner waits for this process alone
    os.setsid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of a server become children of this process
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 2)
    with ExitStack() as lock:
        with suppress(AlignmentError, OSError):  # nobody removes the folder of a keeper that has no lock
            lock.enter_context(held(lock_file(folder), wait=False))
        try:
            _keep(folder)
        finally:
            _end_descendants()
            shutil.rmtree(folder, ignore_errors=True)


def _keep(folder: Path) -> None:
    number, server = 0, None
    while not _owner_has_gone():
        if command_file(folder, number + 1).exists():
            number += 1
            _end_descendants()
            try:
                server = _started(command_file(folder, number))
            except OSError as error:
                write_text(exit_file(folder, number), f"{NOT_STARTED} {error}")
        elif server is not None and server.poll() is not None:
            write_text(exit_file(folder, number), str(server.returncode))
            server = None


def _started(file: Path) -> subprocess.Popen[bytes]:
    command = json.loads(file.read_text(encoding="utf-8"))
    with Path(command["log"]).open("ab") as sink:
        return subprocess.Popen(
            command["argv"],
            env=without_ranks(os.environ) | command["environment"],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=_before_program,
        )


def _before_program() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)


def _owner_has_gone() -> bool:
    readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
    return bool(readable) and os.read(0, 1) == b""


def _end_descendants() -> None:
    for process in _living():
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while _living() and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_all(_living)


def _living() -> list[psutil.Process]:
    living = []
    for process in children_of(psutil.Process(), recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return living


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the owner's pipe alone ends a server."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
