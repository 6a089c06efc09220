"""Tries before the first stage what could stop a later one (alignment/rehearse.py), in a process with a deadline.

``align plan`` does not do this: it runs none of the user's code and needs no tokenizer. The stage that runs first is
left out, because it would fail at once anyway. So are Slurm jobs, whose nodes are not this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignment.config.launch import LauncherKind
from alignment.config.stage import StageConfig
from alignment.core import hardware
from alignment.core.errors import StageError
from alignment.pipeline.backends import command, environment, machines, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.forking import ForkServer
from alignment.pipeline.execute import rehearsed, worker_protocol
from alignment.pipeline.plan import scorer_checks
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.stages.registry import as_trained, kind_of

_FOLDER = ".rehearsal"
_RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""The trial is one process, so it must not wait for others."""


def rehearse(
    plan: Plan,
    stages: Sequence[PlannedStage],
    server: ForkServer | None = None,
    *,
    announce: Callable[[str], None],
) -> None:
    """Tries the stages that run after the first one, in a process that the ``server`` forks, if there is one.

    Raises:
        AlignmentError: the error that a stage would raise: rows that cannot be learned from, or a scorer that fails.
        StageError: no answer within ``launch.hang_seconds``.
    """
    waiting = [stage for stage in stages if stage.has_to_run][1:]
    waiting = [stage for stage in waiting if not stage.unmade]  # there is nothing to try yet
    rows = [stage for stage in waiting if _learns_by_own_tokenizer(stage.config, plan.config.stages)]
    scorers = [stage for stage in waiting if scorer_checks.functions(stage.config)]
    rows = [stage for stage in rows if not rehearsed.is_known(plan, stage, part=rehearsed.ROWS)]
    scorers = [stage for stage in scorers if not rehearsed.is_known(plan, stage, part=rehearsed.SCORERS)]
    if not (rows or scorers):
        return
    announce(_announcement(rows, scorers))
    for note in _try(plan, rows, scorers, server):
        announce(note)
    for part, stages_of_part in ((rehearsed.ROWS, rows), (rehearsed.SCORERS, scorers)):
        for stage in stages_of_part:
            rehearsed.remember(plan, stage, part=part)


def _announcement(rows: Sequence[PlannedStage], scorers: Sequence[PlannedStage]) -> str:
    parts = [(rehearsed.ROWS, rows), (rehearsed.SCORERS, scorers)]
    named = " and ".join(f"{part} of {', '.join(stage.name for stage in stages)}" for part, stages in parts if stages)
    return f"checking {named} before training (takes ten seconds or more, once for these settings and data)"


def _try(
    plan: Plan, rows: Sequence[PlannedStage], scorers: Sequence[PlannedStage], server: ForkServer | None
) -> list[str]:
    """What was noted; an error is raised."""
    folder = plan.run_folder / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "alignment.rehearse", str(folder)]
    argv += ["--rows", *_files(plan, rows, folder), "--scorers", *_files(plan, scorers, folder)]
    code = processes.execute(
        Command(argv=tuple(argv), environment=_environment(plan)),
        log=folder / "log.txt",
        on_poll=_deadline(plan, scorers),
        grace_seconds=1.0,
        server=server,
    )
    kinds = [stage.config.kind for stage in (*rows, *scorers)]
    worker_protocol.raise_for_status(folder, code=code, stage="rehearsal", kinds=kinds)
    notes = worker_protocol.notes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return notes


def _environment(plan: Plan) -> dict[str, str]:
    """A worker's environment, as far as a scorer may read it: a launcher of several processes sets the variables of
    the process's rank, and so does torchrun for one."""
    devices = hardware.count_devices()
    launch = command.with_processes(plan.config.launch, num_devices=devices)
    own = environment.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", ""))
    by_torchrun = command.chosen_launcher(launch, num_devices=devices) is LauncherKind.torchrun
    return own | _RANKS if by_torchrun or launch.num_processes > 1 else own


def _files(plan: Plan, stages: Sequence[PlannedStage], folder: Path) -> Iterator[str]:
    for stage in stages:
        path = worker_protocol.write_stage_file(
            plan, stage, plan.config.launch, git_commit="", folder=folder / stage.name
        )
        yield str(path)


def _deadline(plan: Plan, scorers: Sequence[PlannedStage]) -> Callable[[], None]:
    started, limit = time.monotonic(), plan.config.launch.hang_seconds
    code = ", ".join(function for stage in scorers for function in stage.code)

    def on_poll() -> None:
        machines.show_life(plan.run_folder, plan.config.launch)
        if limit and time.monotonic() - started > limit:
            raise StageError(
                f"checking rows{f' and {code}' if code else ''} before training did not finish within {limit} seconds",
                where="launch.hang_seconds",
                remedy="raise it, or set it to 0, if a scorer or template needs more time",
            )

    return on_poll


def _learns_by_own_tokenizer(config: StageConfig, stages: dict[str, StageConfig]) -> bool:
    """Whether the stage tokenises with the run's base model, and does not start from a policy from outside the run."""
    trained = as_trained(config)
    if trained is None or not kind_of(config).learning.rehearsed:
        return False
    while (name := trained.init.removeprefix("stage:")) in stages:
        before = as_trained(stages[name])
        if before is None:
            break
        trained = before
    return name == "base"
