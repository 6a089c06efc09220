"""A server of this process on loopback that says what a test has it say: a chat endpoint, or one that gives scores. No
model is behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from alignment.config.evaluating import EndpointConfig


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer of the server: ``text`` as a chat completion, or a ``body`` as it stands. ``raw`` are bytes that make
    up the whole answer, status and headers too; they come one after another until the client has enough."""

    text: str = ""
    status: int = 200
    body: str | None = None
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    raw: Iterable[bytes] | None = None
    pause: float = 0.0


Judge = Callable[[str, int], Response | None]
"""From the prompt and the number of the call (from 0) to an answer; None never answers."""

Answering = Callable[[dict[str, Any], int], Response | None]
"""The same from the body of any request."""


@dataclass
class Served:
    """A server at work: ``requests`` are the bodies that came, ``headers`` theirs, ``keys`` what authorizes."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def config(self, **changes: Any) -> EndpointConfig:
        settings: dict[str, Any] = {
            "base_url": self.url,
            "model": "judge",
            "timeout": 5.0,
            "retries": 1,
            "concurrency": 1,
        }
        return EndpointConfig(**(settings | changes))


def serving(judge: Judge, *, port: int = 0) -> AbstractContextManager[Served]:
    """A chat endpoint until the block ends; calls that were never answered are then let go."""
    return listening(lambda body, number: judge(body["messages"][0]["content"], number), port=port)


@contextmanager
def listening(answering: Answering, *, port: int = 0) -> Iterator[Served]:
    """The same for requests of any form, whatever their path."""
    over = threading.Event()
    lock = threading.Lock()
    served = Served(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                served.requests.append(request)
                served.paths.append(self.path)
                served.headers.append(str(self.headers))
                served.keys.append(self.headers.get("Authorization"))
            response = answering(request, number)
            if response is None:
                over.wait(30)
                self.close_connection = True
                return
            if response.raw is not None:
                self._trickle(response.raw, response.pause)
                return
            body = response.body
            if body is None:
                choice = {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": response.text},
                }
                completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge"}
                body = json.dumps(completion | {"choices": [choice]})
            self.send_response(response.status)
            self.send_header("Content-Type", response.kind)
            self.send_header("Content-Length", str(len(body.encode())))
            self.send_header("retry-after-ms", "1")
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def _trickle(self, raw: Iterable[bytes], pause: float) -> None:
            self.close_connection = True
            with suppress(OSError):  # the client has gone
                for piece in raw:
                    self.wfile.write(piece)
                    if pause and over.wait(pause):
                        return

        def log_message(self, *_: Any) -> None:
            """Tests have their own output."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
