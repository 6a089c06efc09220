"""How the workers of a run are started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from alignment.core import hardware
from alignment.pipeline.backends import command, feasibility
from alignment.pipeline.backends.command import CommandFor
from alignment.pipeline.backends.forking import ForkServer, fork_server
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.stages.registry import kind_of

_TOKENIZING = "alignment.data.tokens.row_kinds"
"""All that the rehearsal needs, so that it begins while the server imports the rest."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Workers are started by commands, which the ``server`` forks where it can."""

    command_for: CommandFor
    server: ForkServer | None = None


@contextmanager
def workers_of(plan: Plan, stages: Sequence[PlannedStage], command_for: CommandFor | None) -> Iterator[Workers]:
    """The workers of the stages that have to run; commands other than this machine's own are not forked.

    The server begins at once to import what the stages need, in their order.
    """
    if command_for is not None:
        yield Workers(command_for)
        return
    modules = dict.fromkeys([_TOKENIZING])
    environment: dict[str, str] = {}
    for stage in stages:
        launch = feasibility.of_stage(plan.config.launch, stage.config, num_devices=hardware.count_devices())
        own = command.here(launch, plan.run_folder)
        if own.module:
            modules[kind_of(stage.config).run.partition(":")[0]] = None
            environment = own.environment
    with fork_server(list(modules) if environment else (), environment) as server:
        yield Workers(command.here, server)
