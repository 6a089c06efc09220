"""Calls of the app of ``align serve`` in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from alignment.commands.serve.loaded_arms import LoadedArm

Answered = tuple[int, Any]


class AskedApp:
    """The app of these arms in this process; a call returns the status and the body."""

    def __init__(self, arms: Sequence[LoadedArm]) -> None:
        from alignment.commands.serve.transformers_app import application

        self._app = application(arms)

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        host: str = "127.0.0.1:8000",
        content_type: str = "application/json",
    ) -> Answered:
        """Asks once; a body of bytes is sent as it is."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = [(b"content-type", content_type.encode()), (b"host", host.encode())]
        sent = asyncio.run(self._call(method, path, content, headers, patience=3600))
        text = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(text) if text.startswith((b"{", b"[")) else text.decode() or None

    def leave(self, path: str, bodies: Sequence[Any], *, after: float) -> None:
        """Asks with each body at once; the clients go away after so many seconds."""
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]

        async def all_at_once() -> None:
            contents = [json.dumps(body).encode() for body in bodies]
            await asyncio.gather(*(self._call("POST", path, content, headers, after) for content in contents))

        asyncio.run(all_at_once())

    async def _call(
        self, method: str, path: str, content: bytes, headers: Any, patience: float
    ) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.sleep(patience)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app({**scope, "app": self._app}, receive, send)
        return sent


def asking(arms: Sequence[LoadedArm]) -> AskedApp:
    """A call of it calls the app of these arms."""
    return AskedApp(arms)
