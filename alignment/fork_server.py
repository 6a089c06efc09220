"""Runs modules in processes that begin with their libraries imported: ``python -m alignment.fork_server FD MODULE…``.
It imports the modules in turn and computes nothing. For every request at the socket FD it forks a child, which runs a
module as ``python -m`` would. So a child has its own memory, session, environment and exit code, and lacks only the
seconds of importing. Its client is alignment/pipeline/backends/forking.py. The server ends when its client is gone and
its children have ended."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import socket
import sys
import tempfile
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass

from alignment.core import child_processes

LONGEST_REQUEST = 1 << 17
"""Bytes of a request; Linux allows an environment variable as many."""
MOST_DESCRIPTORS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A module that a child runs with these arguments and all of this environment."""

    module: str
    arguments: list[str]
    environment: dict[str, str]

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def main() -> None:
    """Imports and forks; returns when the client is gone. In a child it returns when the module ends."""
    child_processes.hide()
    client = socket.socket(fileno=int(sys.argv[1]))
    server = _Server(client)
    for module in sys.argv[2:]:
        with suppress(Exception):  # whoever needs the module reports why it cannot be imported
            importlib.import_module(module)
        if (child := server.serve(wait=False)) is not None:
            return _run(child)
    gc.collect()
    gc.freeze()  # else a collection in a child would write to all pages that hold objects, and so copy them
    if (child := server.serve(wait=True)) is not None:
        return _run(child)
    return None


def _run(request: Request) -> None:
    sys.argv[1:] = request.arguments
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


class _Server:
    """Forks children and tells the client their process ids and, when they end, their exit codes."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._selector = selectors.DefaultSelector()
        self._selector.register(client, selectors.EVENT_READ)

    def serve(self, *, wait: bool) -> Request | None:
        """Serves the requests that have come, or all until client and children are gone. In a child it returns the
        request."""
        while self._selector.get_map() and (events := self._selector.select(timeout=None if wait else 0)):
            for key, _ in events:
                if key.fileobj is not self._client:
                    self._report(key)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._client, LONGEST_REQUEST, MOST_DESCRIPTORS)
                if not message:
                    self._selector.unregister(self._client)
                    continue
                request = Request(**json.loads(message))
                output, reports, *locks = descriptors
                if self._fork(reports):
                    _become(request, output=output)
                    return request
                for descriptor in (output, *locks):
                    os.close(descriptor)
        return None

    def _fork(self, reports: int) -> bool:
        """Whether this is the child. What becomes of it is told at the descriptor ``reports``."""
        sys.stdout.flush()  # else a child would print again what a library printed while it was imported
        child = os.fork()
        if child == 0:
            _tell(reports, os.getpid())  # by itself, so that the client knows of it even if the server ends here
            self._close(reports)
            return True
        self._selector.register(os.pidfd_open(child), selectors.EVENT_READ, (child, reports))
        return False

    def _close(self, reports: int) -> None:
        """Closes in a child what only the server needs: with one end still open, a client would wait for ever."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                os.close(key.fd)
                os.close(key.data[1])
        self._selector.close()
        self._client.close()
        os.close(reports)

    def _report(self, key: selectors.SelectorKey) -> None:
        child, reports = key.data
        _, status = os.waitpid(child, 0)
        self._selector.unregister(key.fileobj)
        os.close(key.fd)
        _tell(reports, os.waitstatus_to_exitcode(status))
        os.close(reports)


def _tell(reports: int, number: int) -> None:
    with suppress(OSError):  # the client no longer listens
        os.write(reports, f"{number}\n".encode())


def _become(request: Request, *, output: int) -> None:
    """Makes the child what an executed process would be: a session, a standard output and an environment of its own."""
    os.setsid()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.environ.clear()
    os.environ.update(request.environment)
    child_processes.show()
    _take_own_temporary_folders()


def _take_own_temporary_folders() -> None:
    """Makes the folders anew that libraries made when they were imported (wandb has two): each process removes its own
    at its end."""
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        owner = (finalizer.peek() or [None])[0]
        if isinstance(owner, tempfile.TemporaryDirectory):
            finalizer.detach()
            tempfile.TemporaryDirectory.__init__(owner)


if __name__ == "__main__":
    main()
