"""The client of an endpoint, and its checks before anything is trained."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from alignment.config.evaluating import CallsConfig, ChatEndpointConfig, GradingConfig
from alignment.config.faults import Fault
from alignment.config.scoring import ServerConfig
from alignment.core.errors import ConfigError

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
        from openai import DefaultHttpxClient, OpenAI
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
            http_client=DefaultHttpxClient(timeout=config.timeout, follow_redirects=False, trust_env=not direct),
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
    return str(error) if isinstance(error, NoReply) else f"{type(error).__name__}: {error}"


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
