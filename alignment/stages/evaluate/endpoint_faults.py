"""Checks the settings of a chat endpoint when a run is planned."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from alignment.config.evaluating import ChatEndpointConfig
from alignment.config.faults import Fault
from alignment.evaluation.endpoint import PACKAGE


def endpoint_faults(endpoint: ChatEndpointConfig, path: str, *, hang_seconds: float) -> Iterator[Fault]:
    """What is missing in the settings at ``path``, and retries that outlast ``hang_seconds``; 0 is no limit."""
    for name, value in (("base_url", "a URL such as http://localhost:8000/v1"), ("model", "the endpoint's model name")):
        if not getattr(endpoint, name):
            yield Fault(where=f"{path}.{name}", message=f"missing; set it to {value}")
    longest = endpoint.timeout * (1 + endpoint.retries)
    if 0 < hang_seconds <= longest:
        message = (
            f"{endpoint.timeout:g} seconds, {1 + endpoint.retries} times, are not less than launch.hang_seconds "
            f"({hang_seconds:g}), after which a stage is stopped as stuck; lower it, or raise launch.hang_seconds"
        )
        yield Fault(where=f"{path}.timeout", message=message)


def client_missing(setting: str) -> str:
    """What to say if the client's package is not installed, which ``setting`` needs; empty if it is."""
    if importlib.util.find_spec("openai") is not None:
        return ""
    return f"'{setting}' needs the package openai, which is not installed; pip install '{PACKAGE}'"
