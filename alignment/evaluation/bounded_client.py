"""An HTTP client for a server that nobody vouches for: a try has a time and a size, and nothing follows a redirect.

A client's own timeout begins again with every byte that comes, so a byte a second keeps it waiting for ever. Here each
read from the socket gets what is left of the whole try's time. What comes is counted before it is unpacked, and must
not be packed. A redirect would take the prompts, and to the same host the key, to a place that the user never named.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

MOST_BYTES = 4 << 20
"""Of an answer with its headers; a judge's thousand words take some kilobytes."""


class Refused(Exception):
    """Why an answer was not read to its end."""


class _Allowance(threading.local):
    """What is left of the try that this thread makes."""

    seconds = 0.0
    end = math.inf
    left = MOST_BYTES

    def begin(self, seconds: float) -> None:
        """A try begins."""
        self.seconds, self.end, self.left = seconds, time.monotonic() + seconds, MOST_BYTES

    def remaining(self) -> float:
        """Seconds.

        Raises:
            Refused: there are none.
        """
        remaining = self.end - time.monotonic()
        if remaining <= 0:
            raise Refused(f"timed out: the whole answer was not there within {self.seconds:g} s")
        return remaining

    def take(self, content: bytes) -> bytes:
        """Counts what came.

        Raises:
            Refused: it is too much.
        """
        self.left -= len(content)
        if self.left < 0:
            raise Refused(f"its answer is longer than {MOST_BYTES >> 20} MiB")
        return content


def bounded_client(seconds: float) -> Any:
    """A client for ``OpenAI(http_client=…)``, each of whose tries takes at most so long."""
    from openai import DefaultHttpxClient

    allowance = _Allowance()

    def begin(_: Any) -> None:
        allowance.begin(seconds)

    client = DefaultHttpxClient(
        timeout=seconds,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [begin], "response": [_refuse_packed]},
    )
    for transport in (client._transport, *client._mounts.values()):  # directly, and by proxies of the environment's
        if transport is not None:
            transport._pool._network_backend = _Backend(transport._pool._network_backend, allowance)
    return client


def _refuse_packed(response: Any) -> None:
    """Some kilobytes could be gigabytes once unpacked."""
    packing = response.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise Refused(f"its answer is packed ({packing:.20}), which was not asked for")


class _Backend:
    """Opens connections whose reads keep within the allowance."""

    def __init__(self, backend: Any, allowance: _Allowance) -> None:
        self._backend = backend
        self._allowance = allowance

    def connect_tcp(self, *address: Any, timeout: float | None = None, **options: Any) -> Any:
        """A connection."""
        within = _within(timeout, self._allowance)
        return _Stream(self._backend.connect_tcp(*address, timeout=within, **options), self._allowance)

    def sleep(self, seconds: float) -> None:
        """Waits."""
        self._backend.sleep(seconds)


class _Stream:
    """A connection, encrypted or not."""

    def __init__(self, stream: Any, allowance: _Allowance) -> None:
        self._stream = stream
        self._allowance = allowance

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What came next."""
        return self._allowance.take(self._stream.read(max_bytes, timeout=_within(timeout, self._allowance)))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends it."""
        self._stream.write(buffer, timeout=_within(timeout, self._allowance))

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        """The same connection, encrypted."""
        within = _within(timeout, self._allowance)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout=within), self._allowance)

    def get_extra_info(self, info: str) -> Any:
        """What is known of it."""
        return self._stream.get_extra_info(info)


def _within(timeout: float | None, allowance: _Allowance) -> float:
    remaining = allowance.remaining()
    return remaining if timeout is None else min(timeout, remaining)
