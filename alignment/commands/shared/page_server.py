"""Pages of this machine alone, as a web application on a port of 127.0.0.1.

Only the address with the token is answered, under a host name of this machine: another page in the same browser knows
neither (a page that points its own name at 127.0.0.1 is refused by that name). Templates escape every text, and a
content security policy allows the application's own scripts and styles alone."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignment.engines.server_process import HOST

HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; form-action 'self'; "
        "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def guarded(routes: Sequence[Route], token: str, *, command: str) -> ASGIApp:
    """The application behind its token; ``command`` printed the address."""
    middleware = [
        Middleware(_Guard, token=token, command=command),
        Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
    ]
    return Starlette(routes=routes, middleware=middleware)


class _Guard:
    """Takes the token off the path, refuses a request without it, and puts the headers on every response."""

    def __init__(self, app: ASGIApp, token: str, command: str) -> None:
        self._app, self._token, self._command = app, token.encode(), command
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        app: ASGIApp = self._app
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(first.encode("utf-8", "replace"), self._token):
            refusal = f"Open the address that `{self._command}` printed, with its token.\n"
            app = PlainTextResponse(refusal, status_code=403)
        elif not slash:
            app = RedirectResponse(f"/{first}/")
        await app({**scope, "path": f"/{rest}"}, receive, send_with_headers)


def assets(package: str, style: str, script: str, *more: str) -> list[Route]:
    """The style of the reports with ``more`` style sheets and that of the package's pages, and the package's script."""
    styles = "\n".join([_text("alignment.report", "style.css"), *more, _text(package, style)])
    return [
        Route("/style.css", Response(styles, media_type="text/css")),
        Route(f"/{script}", Response(_text(package, script), media_type="text/javascript")),
    ]


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")


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
