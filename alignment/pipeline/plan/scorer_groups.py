"""Checks the scorers that a group of settings describes: servers, graders and ensembles."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault, unread_faults, unread_notes
from alignment.config.reward_server import ServerApi, ServerConfig
from alignment.config.scoring import Combine, EnsembleConfig, MemberConfig, ScorerConfig, ScoreSourceConfig
from alignment.config.stage import StageConfig
from alignment.evaluation.endpoint_client import api_key
from alignment.evaluation.endpoint_faults import client_missing, endpoint_faults, scale_faults
from alignment.rewards.scorer_sources import GROUPS
from alignment.rewards.server_apis import APIS, NUMBERED
from alignment.stages.registry import kind_of


def group_faults(where: str, scorer: ScoreSourceConfig, *, hang_seconds: float) -> Iterator[Fault]:
    """A group that is missing or has no effect, and everything wrong inside the one that counts."""
    for source, name in GROUPS.items():
        group = getattr(scorer, name, None)
        if source == scorer.source and group is None:
            yield Fault(where=f"{where}.{name}", message=f"missing; '{source}' needs it")
        elif source != scorer.source and group is not None:
            message = f"has no effect; only the source '{source}' uses it, but source is '{scorer.source}'"
            yield Fault(where=f"{where}.{name}", message=message)
        elif group is not None:
            yield from _inside(f"{where}.{name}", scorer, hang_seconds)


def refuse_missing_keys(stage: StageConfig, where: str) -> None:
    """Does nothing if the environment has the keys of all servers that the stage's scorers ask.

    Raises:
        ConfigError: a variable is not set.
    """
    for field, scorer in kind_of(stage).scorers(stage).items():
        if scorer.server is not None:
            api_key(scorer.server.api_key_env, where=f"{where}.{field}.server.api_key_env")
        if isinstance(scorer, MemberConfig) and scorer.grader is not None:
            api_key(scorer.grader.endpoint.api_key_env, where=f"{where}.{field}.grader.endpoint.api_key_env")


def _inside(path: str, scorer: ScoreSourceConfig, hang_seconds: float) -> Iterator[Fault]:
    if scorer.server is not None:
        yield from _server_faults(scorer.server, path, hang_seconds)
    elif isinstance(scorer, MemberConfig) and scorer.grader is not None:
        yield from endpoint_faults(scorer.grader.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        yield from scale_faults(scorer.grader, path)
    elif isinstance(scorer, ScorerConfig) and scorer.ensemble is not None:
        yield from _ensemble_faults(scorer.ensemble, path)
        return
    if message := client_missing(scorer.source):
        yield Fault(where=path, message=message)


def _server_faults(server: ServerConfig, path: str, hang_seconds: float) -> Iterator[Fault]:
    yield from endpoint_faults(server, path, hang_seconds=hang_seconds)
    api, name = APIS[server.api], server.api.value
    if server.label is not None and not api.labels:
        readers = ", ".join(f"'{other.value}'" for other in ServerApi if APIS[other].labels)
        yield Fault(where=f"{path}.label", message=f"has no effect; only {readers} use it, but api is '{name}'")
    elif server.label is not None and server.api in NUMBERED and not server.label.isdecimal():
        message = f"{server.label!r} is not the number of a class; '{name}' numbers them from 0, as in label: '1'"
        yield Fault(where=f"{path}.label", message=message)
    if api.single:
        readers = "an api whose calls can have several answers"
        yield from unread_notes(server, ServerConfig(), ("batch_size",), path, readers)


def _ensemble_faults(ensemble: EnsembleConfig, path: str) -> Iterator[Fault]:
    if len(ensemble.members) < 2:
        message = f"an ensemble of {len(ensemble.members)} has nothing to combine; list 2 or more scorers"
        yield Fault(where=f"{path}.members", message=message)
    if ensemble.combine is not Combine.mean_minus_std:
        reader = f"only combine '{Combine.mean_minus_std.value}'"
        yield from unread_faults(ensemble, EnsembleConfig(), ("std_weight",), path, reader)
