"""An HTTP client with bounds, and the checks of an endpoint before anything is trained."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from alignment.config.evaluating import CallsConfig, ChatEndpointConfig, GradingConfig
from alignment.config.faults import Fault
from alignment.config.scoring import ServerConfig
from alignment.core.errors import ConfigError

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
        """The seconds left for this try. Raises Refused: no time is left."""
        remaining = self.end - time.monotonic()
        if remaining <= 0:
            raise Refused(f"timed out: the whole answer did not arrive within {self.seconds:g} s")
        return remaining

    def take(self, content: bytes) -> bytes:
        """Counts received bytes and returns them. Raises Refused: the answer is too long."""
        self.left -= len(content)
        if self.left < 0:
            raise Refused(f"its answer is longer than {MOST_BYTES >> 20} MiB")
        return content


def bounded_client(seconds: float, *, direct: bool = False) -> Any:
    """A client for ``OpenAI(http_client=…)``, each of whose tries takes at most this many seconds. ``direct``: without
    the proxies of the environment, for a server on this machine."""
    from openai import DefaultHttpxClient

    allowance = _Allowance()

    client = DefaultHttpxClient(
        timeout=seconds,
        follow_redirects=False,
        trust_env=not direct,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [lambda _: allowance.begin(seconds)], "response": [_refuse_packed]},
    )
    for transport in (client._transport, *client._mounts.values()):  # direct, and through proxies of the environment
        if transport is not None:
            transport._pool._network_backend = _Bounded(transport._pool._network_backend, allowance)
    return client


def _refuse_packed(response: Any) -> None:
    """Refuses a compressed answer: a few kilobytes could expand to gigabytes."""
    packing = response.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise Refused(f"its answer is compressed ({packing:.20}), which was not requested")


class _Bounded:
    """A network backend or a connection of it, encrypted or not, that waits and reads within the allowance."""

    def __init__(self, wrapped: Any, allowance: _Allowance) -> None:
        self._wrapped = wrapped
        self._allowance = allowance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def connect_tcp(self, *address: Any, timeout: float | None = None, **options: Any) -> _Bounded:
        connection = self._wrapped.connect_tcp(*address, timeout=self._within(timeout), **options)
        return _Bounded(connection, self._allowance)

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Bounded:
        encrypted = self._wrapped.start_tls(ssl_context, server_hostname, timeout=self._within(timeout))
        return _Bounded(encrypted, self._allowance)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._allowance.take(self._wrapped.read(max_bytes, timeout=self._within(timeout)))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._wrapped.write(buffer, timeout=self._within(timeout))

    def _within(self, timeout: float | None) -> float:
        remaining = self._allowance.remaining()
        return remaining if timeout is None else min(timeout, remaining)


PACKAGE = "openai>=3,<4"
_HIDDEN = 8
"""At least so many characters of a key are recognised as its beginning."""


def api_key(variable: str | None, *, where: str, without: str = "set api_key_env to null") -> str:
    """The key in an environment variable, or "" if a server needs none; ``where`` is the setting that names it, and
    ``without`` says what to do if there is no key. Raises ConfigError: the environment variable is not set."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(
            f"the environment variable {variable} is not set",
            where=where,
            remedy=f"export {variable}=…, or {without} for a server without a key",
        )
    return key


def open_client(config: CallsConfig, key: str, *, where: str, direct: bool = False) -> Any:
    """A client for calls to ``config.base_url``; ``direct`` without the proxies of the environment. Raises ConfigError:
    its package is not installed."""
    try:
        from openai import OpenAI
    except ImportError:
        raise ConfigError(
            "an endpoint needs the package openai, which is not installed",
            where=where,
            remedy=f"pip install '{PACKAGE}'",
        ) from None
    with _without_variables():
        return OpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            timeout=config.timeout,
            max_retries=config.retries,
            http_client=bounded_client(config.timeout, direct=direct),
        )


def reason(error: Exception, *, key: str) -> str:
    """The error as one line, without the key, which some servers repeat in their messages. A quoted reply may have been
    cut in the middle of the key, so its beginnings are hidden too."""
    line = " ".join(_words(error).split())
    for size in range(len(key), min(len(key), _HIDDEN) - 1, -1) if key else ():
        line = line.replace(key[:size], "***")
    return line[:300]


def _words(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None and 300 <= response.status_code < 400:
        target = urlsplit(response.headers.get("location", ""))
        origin = f"{target.scheme}://{target.netloc}" if target.netloc else "another path"
        return (
            f"it redirects to {origin}, and neither the key nor prompts are sent there. If that address is right, "
            f"give it as base_url"
        )
    if isinstance(error, RecursionError):
        return "its reply is nested too deeply"
    return str(error) if isinstance(error, (Refused, NoReply)) else f"{type(error).__name__}: {error}"


class NoReply(ValueError):
    """A server's answer that is not what was asked for; says what is wrong with it."""


@contextmanager
def _without_variables() -> Iterator[None]:
    """Hides OPENAI_ variables: the client would read keys, names and headers from them and send them to any server."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(taken)


def endpoint_faults(endpoint: ChatEndpointConfig | ServerConfig, path: str, *, hang_seconds: float) -> Iterator[Fault]:
    """What is missing in the settings at ``path``, and retries that outlast ``hang_seconds``; 0 is no limit."""
    for name, value in (("base_url", "a URL such as http://localhost:8000/v1"), ("model", "the endpoint's model name")):
        if not getattr(endpoint, name):
            yield Fault(where=f"{path}.{name}", message=f"missing; set it to {value}")
    longest = endpoint.timeout * (1 + endpoint.retries)
    if 0 < hang_seconds <= longest:
        message = (
            f"{endpoint.timeout:g} seconds times {1 + endpoint.retries} attempts is not less than launch.hang_seconds "
            f"({hang_seconds:g}), after which a stage counts as stuck; lower it, or raise launch.hang_seconds"
        )
        yield Fault(where=f"{path}.timeout", message=message)


def scale_faults(grader: GradingConfig, path: str) -> Iterator[Fault]:
    """A scale without two grades."""
    if grader.highest <= grader.lowest:
        message = f"must be above {path}.lowest, which is {grader.lowest}; it is {grader.highest}"
        yield Fault(where=f"{path}.highest", message=message)


def client_missing(setting: str) -> str:
    """What to say if the client's package is not installed, which ``setting`` needs; empty if it is."""
    if importlib.util.find_spec("openai") is not None:
        return ""
    return f"'{setting}' needs the package openai, which is not installed; pip install '{PACKAGE}'"
