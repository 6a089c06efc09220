"""How the workers of a run are started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alignment.core import hardware
from alignment.core.errors import StageError
from alignment.pipeline.backends import command, feasibility
from alignment.pipeline.backends.command import CommandFor
from alignment.pipeline.backends.forking import ForkServer, fork_server
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.worker import Heartbeat
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
    """The workers of the stages that have to run; commands other than this machine's own are not forked. The server
    begins at once to import what the stages need, in their order."""
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


SILENT = 10.0
"""Seconds without a heartbeat after which a process does not run: it was stopped, or its machine is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessState:
    """The last heartbeat of a process; ``silent`` is the number of seconds, by the reader's clock, since it was new."""

    rank: int
    last: Heartbeat
    silent: float = 0.0

    @property
    def idle(self) -> float:
        """Seconds in which the process has done nothing."""
        return self.last.time - self.last.since + self.silent

    def __str__(self) -> str:
        return f"{self.last.phase}, {self.last.location}"


class Watch:
    """Reads the heartbeats repeatedly, and measures with its own clock how long each has been the same."""

    def __init__(self, work: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._work, self._clock = work, clock
        self._new: dict[int, tuple[tuple[int, float], float]] = {}

    def look(self) -> list[ProcessState]:
        """The last heartbeat of every process that has written one, by rank."""
        now = self._clock()
        states = []
        for rank, last in Heartbeat.read_all(self._work).items():
            identity = (last.pid, last.time)
            if rank not in self._new or self._new[rank][0] != identity:
                self._new[rank] = (identity, now)
            states.append(ProcessState(rank=rank, last=last, silent=now - self._new[rank][1]))
        return states


def refuse_stuck(states: Sequence[ProcessState], *, processes: int, limit: float, stage: str) -> None:
    """Returns while any process is at work or has not started yet. Raises StageError: no process did anything for
    ``limit`` seconds; it names the process that the others wait for."""
    if len(states) < processes or any(state.idle < limit for state in states):
        return
    silent = [state for state in states if state.silent >= SILENT]
    alone = [state for state in states if not state.last.waits]
    if not silent and not alone and processes > 1:
        locations = "\n".join(f"  process {state.rank}: {state}" for state in states)
        why = f"all processes are waiting for each other or for their GPUs\n{locations}"
        message = f"nothing happened for {limit:g} seconds: {why}"
    else:
        culprit = (silent or alone or list(states))[0]
        how = "has not run" if silent else "has been stuck"
        message = f"process {culprit.rank} of {processes} {how} for {limit:g} seconds: {culprit}"
    remedy = "start the run again to continue from the last checkpoint; launch.hang_seconds sets this limit"
    raise StageError(message, where=f"stage {stage}", remedy=remedy)
