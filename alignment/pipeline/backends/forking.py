"""Starts commands as children of a server that has imported their libraries (alignment/fork_server.py).

Only without a GPU, because a driver of CUDA does not survive a fork, and on Linux. There is one server for a run.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

from alignment.core import hardware
from alignment.core.stop_requests import sigusr1_blocked
from alignment.fork_server import Request
from alignment.pipeline.backends.command import Command

LATER = {"ALIGNMENT_DEVICE", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
"""Variables that are read after the libraries are imported, so that they may differ from the server's."""


_PATIENCE = 5.0
"""Seconds in which a server removes what its libraries have left."""


class ForkedProcess(psutil.Process):
    """A child of the server. ``reports`` has its exit code once it has ended."""

    def __init__(self, pid: int, reports: socket.socket) -> None:
        super().__init__(pid)
        self._reports = reports
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal; 1 if the server ended before it, so that nobody knows.

        Raises:
            psutil.TimeoutExpired: it still runs.
        """
        if self._code is None:
            ready, _, _ = select.select([self._reports], [], [], timeout)
            if not ready:
                raise psutil.TimeoutExpired(timeout or 0.0, pid=self.pid)
            if report := self._reports.recv(32):
                self._code = int(report)
            else:
                super().wait(timeout)
                self._code = 1
            self._reports.close()
        return self._code


class ForkServer:
    """A server, and its environment."""

    def __init__(self, process: subprocess.Popen[bytes], client: socket.socket, environment: Mapping[str, str]) -> None:
        self._process = process
        self._client = client
        self._environment = environment

    def start(self, command: Command, *, output: int, keep_open: Sequence[int]) -> ForkedProcess | None:
        """Starts a command with the descriptor ``output`` as its standard output.

        None if it must be executed: it is not one module in one process, its environment differs where libraries read
        it while they are imported, or the server has ended.
        """
        environment = {**os.environ, **command.environment}
        if not command.module or _early(environment) != _early(self._environment):
            return None
        request = Request(module=command.module, arguments=[*command.argv[3:]], environment=environment)
        own_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end, suppress(OSError, ValueError):
            socket.send_fds(self._client, [request.encode()], [output, server_end.fileno(), *keep_open])
            server_end.close()  # the server's copy alone, so that its end is seen
            return ForkedProcess(int(own_end.recv(32)), own_end)
        own_end.close()
        return None

    def close(self) -> None:
        """Ends the server, which first waits for its children."""
        self._client.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def fork_server(modules: Sequence[str], environment: Mapping[str, str]) -> Iterator[ForkServer | None]:
    """A server that has imported, or soon will have, these modules; None where processes are not to be forked."""
    if not modules or not _can_fork():
        yield None
        return
    own_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    complete = {**os.environ, **environment}
    with server_end, sigusr1_blocked():
        process = subprocess.Popen(
            [sys.executable, "-m", "alignment.fork_server", str(server_end.fileno()), *modules],
            env=complete,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[server_end.fileno()],
            start_new_session=True,
        )
    server = ForkServer(process, own_end, complete)
    try:
        yield server
    finally:
        server.close()


def _can_fork() -> bool:
    if hardware.count_devices() or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # Linux before 5.3
        return False
    return True


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in LATER}
