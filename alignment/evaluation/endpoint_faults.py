"""Checks the settings of a server that is called over HTTP, when a run is planned."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from alignment.config.evaluating import ChatEndpointConfig
from alignment.config.faults import Fault
from alignment.config.grader import GradingConfig
from alignment.config.reward_server import ServerConfig
from alignment.evaluation.endpoint_client import PACKAGE


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
