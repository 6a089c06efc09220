"""Serves the page on a port of 127.0.0.1, which no other machine reaches."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from alignment.commands.judge.ballots import Ballots
from alignment.commands.judge.web_app import application
from alignment.core.errors import Busy, ConfigError

HOST = "127.0.0.1"
_LARGEST_PORT = 65535


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens on a port of this machine; 0 is any free one.

    Raises:
        ConfigError: there is no such port, or this user may not take it.
        Busy: another program listens there.
    """
    if not 0 <= port <= _LARGEST_PORT:
        raise ConfigError(f"{port} is not a port", where="--port", remedy=f"give one from 1 to {_LARGEST_PORT}, or 0")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Busy(
                    f"another program listens on port {port}",
                    where="--port",
                    remedy="give another, or 0 for a free one",
                ) from None
            if error.errno == errno.EACCES:
                raise ConfigError(
                    f"this user may not listen on port {port}", where="--port", remedy="give one above 1023"
                ) from None
            raise
        yield listener


class Page:
    """The page for one pair of arms, and the address at which it is served."""

    def __init__(self, ballots: Ballots, listener: socket.socket, *, run: str, annotator: str | None) -> None:
        token = secrets.token_urlsafe(32)
        self.address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(ballots, token, run=run, annotator=annotator),
                lifespan="off",
                http="h11",
                ws="none",
                log_level="warning",
                access_log=False,  # it would write the token
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=5,
            )
        )

    def serve(self) -> None:
        """Answers requests until Ctrl-C; a request that is being answered is finished first."""
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
            self._server.run(sockets=[self._listener])

    def stop(self) -> None:
        """Ends ``serve``, from another thread."""
        self._server.should_exit = True
