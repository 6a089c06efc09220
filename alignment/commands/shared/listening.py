"""Ports of 127.0.0.1, which no other machine reaches."""

from __future__ import annotations

import errno
import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from alignment.core.errors import Busy, ConfigError
from alignment.engines.server_process import HOST

PAGE_LIBRARIES = {"starlette": "starlette>=1,<2", "uvicorn": "uvicorn>=0.34,<1"}
"""The packages that a page on this machine needs, and what pip is to install."""


def refuse_without_page_libraries(*, where: str, needs: str) -> None:
    """Raises ConfigError if a library of ``PAGE_LIBRARIES`` is missing; ``needs`` begins the message, as in "the page
    needs"."""
    missing = [wanted for name, wanted in PAGE_LIBRARIES.items() if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install {' '.join(repr(wanted) for wanted in missing)}"
        names = " and ".join(wanted.partition(">")[0] for wanted in missing)
        raise ConfigError(f"{needs} {names}, not installed here", where=where, remedy=command)


_LARGEST_PORT = 65535


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens on a port of this machine; 0 is any free one. Raises ConfigError, Busy."""
    where = "--port"
    if not 0 <= port <= _LARGEST_PORT:
        raise ConfigError(f"{port} is not a port", where=where, remedy=f"give a port from 1 to {_LARGEST_PORT}, or 0")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = "give another port, or 0 for any free port"
                raise Busy(f"another program already listens on port {port}", where=where, remedy=remedy) from None
            if error.errno == errno.EACCES:
                message = f"you may not listen on port {port}"
                raise ConfigError(message, where=where, remedy="give a port above 1023") from None
            raise
        yield listener
