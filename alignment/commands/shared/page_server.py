"""Serves a web application on a port of 127.0.0.1, which no other machine reaches."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from alignment.engines.server_process import HOST


class PageServer:
    """A server, and the address at which it is reached."""

    def __init__(self, application: Callable[[str], ASGIApp], listener: socket.socket) -> None:
        """``application`` makes the application that answers under a token."""
        token = secrets.token_urlsafe(32)
        self.address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(token),
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
