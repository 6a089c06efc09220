"""A proxy on this machine that stops in the middle of a chosen object, so that a test can kill who waits for it."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress

_BLOCK = 4096


class HoldingProxy:
    """Forwards to ``port``. Once a request matches ``pattern``, the direction ``holds`` (``request`` or ``response``)
    of its connection passes ``letting`` bytes and no more. ``held`` is set then."""

    def __init__(self, port: int, *, pattern: bytes, holds: str, letting: int) -> None:
        self.held = threading.Event()
        self._target, self._pattern, self._holds, self._letting = port, re.compile(pattern), holds, letting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                chosen = threading.Event()
                for source, sink, direction in ((client, server, "request"), (server, client, "response")):
                    threading.Thread(target=self._forward, args=(source, sink, direction, chosen), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, direction: str, chosen: threading.Event) -> None:
        left = self._letting
        with suppress(OSError):
            while block := source.recv(_BLOCK):
                if direction == "request" and self._pattern.search(block):
                    chosen.set()
                if direction == self._holds and chosen.is_set():
                    if left < len(block):
                        sink.sendall(block[:left])
                        self.held.set()
                        return  # the connection stays open, and nothing more comes
                    left -= len(block)
                sink.sendall(block)
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
