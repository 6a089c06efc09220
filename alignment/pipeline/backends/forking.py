"""Starts commands as children of a server that has imported their libraries (alignment/fork_server.py).

Only without a GPU, because a driver of CUDA does not survive a fork, and on Linux. There is one server for a run.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

from alignment.config.launch import DEVICE, DIVIDE_ROWS
from alignment.core import hardware
from alignment.core.child_processes import sigusr1_blocked
from alignment.fork_server import LONGEST_REQUEST, Request
from alignment.pipeline.backends.command import Command, complete

LATER = {DEVICE, DIVIDE_ROWS, "RANK", "LOCAL_RANK", "WORLD_SIZE"}
"""Variables that are read after the libraries are imported, so that they may differ from the server's."""
_PATIENCE = 5.0
"""Seconds in which a server reports the end of a child, or removes what its libraries have left."""
_LOOK = 0.1
"""Seconds between two looks at whether the caller gives up."""


class ForkedProcess(psutil.Process):
    """A child of the server. ``reports`` has its exit code once it has ended and the server has noticed."""

    def __init__(self, pid: int, reports: socket.socket) -> None:
        self._init(pid, _ignore_nsp=True)  # type: ignore[attr-defined]  # it may have ended already
        self._reports = reports
        self._end: int | None = None
        with suppress(ProcessLookupError):
            self._end = os.pidfd_open(pid)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal; 1 if the server does not report it, so that nobody knows. Raises
        psutil.TimeoutExpired: it still runs."""
        if self._code is None:
            self._code = self._reported(timeout)
            self._reports.close()
            if self._end is not None:
                os.close(self._end)
        return self._code

    def _reported(self, timeout: float | None) -> int:
        reports, ends = self._reports.fileno(), [] if self._end is None else [self._end]
        ready = _readable([reports, *ends], timeout)
        if ready == ends:  # it has ended, and the server will report that unless it hangs or has ended too
            ready = _readable([reports], _PATIENCE)
        if reports in ready and (report := self._reports.recv(32)):
            return int(report)
        if ends and not _readable(ends, timeout):
            raise psutil.TimeoutExpired(timeout or 0.0, pid=self.pid)
        return 1


def _readable(descriptors: Sequence[int], timeout: float | None) -> list[int]:
    return select.select(descriptors, [], [], timeout)[0]


class ForkServer:
    """A server, and its environment."""

    def __init__(self, process: subprocess.Popen[bytes], client: socket.socket, environment: Mapping[str, str]) -> None:
        self._process, self._client, self._environment = process, client, environment

    def start(
        self, command: Command, *, output: int, keep_open: Sequence[int], gives_up: Callable[[], bool]
    ) -> ForkedProcess | None:
        """Starts a command with the descriptor ``output`` as its standard output, once the server has imported what it
        is importing. None if it must be executed: it is not one module in one process, its environment differs where
        libraries read it while they are imported, the server has ended, or the caller ``gives_up`` the wait."""
        environment = complete(command.environment)
        if not command.module or _early(environment) != _early(self._environment):
            return None
        request = Request(module=command.module, arguments=[*command.argv[3:]], environment=environment).encode()
        if len(request) > LONGEST_REQUEST:
            return None
        own_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end, suppress(OSError, ValueError):
            socket.send_fds(self._client, [request], [output, server_end.fileno(), *keep_open])
            server_end.close()  # the server's copy alone, so that its end is seen
            while not _readable([own_end.fileno()], _LOOK):
                if gives_up():
                    self._process.kill()  # its end of the socket closes, unless a child has it
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
    variables = complete(environment)
    with server_end, sigusr1_blocked():
        process = subprocess.Popen(
            [sys.executable, "-m", "alignment.fork_server", str(server_end.fileno()), *modules],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[server_end.fileno()],
            start_new_session=True,
        )
    server = ForkServer(process, own_end, variables)
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
