"""An HTTP client for an untrusted server: each try is limited in time and size, and redirects are not followed.

A client's own timeout starts again with every byte received, so a server that sends a byte a second could keep it
waiting forever. Here each read from the socket gets only the time left for the whole try. Bytes are counted as they
arrive, and compressed answers are refused. A redirect would send the prompts (and, to the same host, the key) to an
address that the user never named.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

MOST_BYTES = 4 << 20
"""Limit of an answer with its headers; a judge's thousand words take a few kilobytes."""


class Refused(Exception):
    """The reason why an answer was not read to its end."""


class _Allowance(threading.local):
    """Time and bytes left for the current try of this thread."""

    seconds = 0.0
    end = math.inf
    left = MOST_BYTES

    def begin(self, seconds: float) -> None:
        """Starts a try that may take this many seconds."""
        self.seconds, self.end, self.left = seconds, time.monotonic() + seconds, MOST_BYTES

    def remaining(self) -> float:
        """The seconds left for this try.

        Raises:
            Refused: no time is left.
        """
        remaining = self.end - time.monotonic()
        if remaining <= 0:
            raise Refused(f"timed out: the whole answer did not arrive within {self.seconds:g} s")
        return remaining

    def take(self, content: bytes) -> bytes:
        """Counts received bytes and returns them.

        Raises:
            Refused: the answer is too long.
        """
        self.left -= len(content)
        if self.left < 0:
            raise Refused(f"its answer is longer than {MOST_BYTES >> 20} MiB")
        return content


def bounded_client(seconds: float, *, direct: bool = False) -> Any:
    """A client for ``OpenAI(http_client=…)``, each of whose tries takes at most this many seconds.

    ``direct``: without the proxies of the environment, for a server on this machine.
    """
    from openai import DefaultHttpxClient

    allowance = _Allowance()

    def begin(_: Any) -> None:
        allowance.begin(seconds)

    client = DefaultHttpxClient(
        timeout=seconds,
        follow_redirects=False,
        trust_env=not direct,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [begin], "response": [_refuse_packed]},
    )
    for transport in (client._transport, *client._mounts.values()):  # direct, and through proxies of the environment
        if transport is not None:
            transport._pool._network_backend = _Backend(transport._pool._network_backend, allowance)
    return client


def _refuse_packed(response: Any) -> None:
    """Refuses a compressed answer: a few kilobytes could expand to gigabytes."""
    packing = response.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise Refused(f"its answer is compressed ({packing:.20}), which was not requested")


class _Backend:
    """Opens connections whose reads keep within the allowance."""

    def __init__(self, backend: Any, allowance: _Allowance) -> None:
        self._backend = backend
        self._allowance = allowance

    def connect_tcp(self, *address: Any, timeout: float | None = None, **options: Any) -> Any:
        """Opens a connection."""
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
        """The next bytes."""
        return self._allowance.take(self._stream.read(max_bytes, timeout=_within(timeout, self._allowance)))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends bytes."""
        self._stream.write(buffer, timeout=_within(timeout, self._allowance))

    def close(self) -> None:
        """Closes the connection."""
        self._stream.close()

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        """The same connection, encrypted."""
        within = _within(timeout, self._allowance)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout=within), self._allowance)

    def get_extra_info(self, info: str) -> Any:
        """Information about the connection."""
        return self._stream.get_extra_info(info)


def _within(timeout: float | None, allowance: _Allowance) -> float:
    remaining = allowance.remaining()
    return remaining if timeout is None else min(timeout, remaining)
