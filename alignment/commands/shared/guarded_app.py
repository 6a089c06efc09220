"""Pages of this machine alone, as a web application.

Only the address with the token is answered, under a host name of this machine: another page in the same browser knows
neither (a page that points its own name at 127.0.0.1 is refused by that name). Templates escape every text, and a
content security policy allows the application's own scripts and styles alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib import resources

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
        Middleware(_WithHeaders),
        Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
        Middleware(_WithToken, token=token, command=command),
    ]
    return Starlette(routes=routes, middleware=middleware)


class _WithHeaders:
    """Puts the headers on every response, refusals too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _WithToken:
    """Takes the token off the beginning of the path, and refuses a request without it."""

    def __init__(self, app: ASGIApp, token: str, command: str) -> None:
        self._app = app
        self._token = token.encode()
        self._command = command

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(first.encode("utf-8", "replace"), self._token):
            refusal = f"Open the address that `{self._command}` printed, with its token.\n"
            await PlainTextResponse(refusal, status_code=403)(scope, receive, send)
        elif not slash:
            await RedirectResponse(f"/{first}/")(scope, receive, send)
        else:
            await self._app({**scope, "path": f"/{rest}"}, receive, send)


def assets(package: str, style: str, script: str, *more: str) -> list[Route]:
    """The style of the reports with ``more`` style sheets and that of the package's pages, and the package's script."""
    styles = "\n".join([_text("alignment.report", "style.css"), *more, _text(package, style)])
    return [
        Route("/style.css", Response(styles, media_type="text/css")),
        Route(f"/{script}", Response(_text(package, script), media_type="text/javascript")),
    ]


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")
