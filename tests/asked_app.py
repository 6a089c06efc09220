"""Calls of the app of ``align serve`` in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from alignment.commands.serve.loaded_arms import LoadedArm

Answered = tuple[int, Any]


def asking(arms: Sequence[LoadedArm]) -> Callable[..., Answered]:
    """A function that calls the app of these arms; it returns the status and the body."""
    from alignment.commands.serve.transformers_app import application

    app = application(arms)

    async def call(method: str, path: str, body: Any, host: str) -> Answered:
        sent: list[dict[str, Any]] = []
        headers = [(b"content-type", b"application/json"), (b"host", host.encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b"", "app": app}
        content = json.dumps(body).encode() if body is not None else b""
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.sleep(3600)
            raise AssertionError("nobody waits that long")

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        text = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(text) if text.startswith((b"{", b"[")) else text.decode() or None

    return lambda method, path, body=None, host="127.0.0.1:8000": asyncio.run(call(method, path, body, host))
