"""Several machines on one shared folder: the first runs the plan, the others start their processes of each stage.

Before a stage's processes start, the first machine leaves word of the attempt beside the stage's file; every other one
answers each attempt once, with the same command under its own rank.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from alignment import launcher
from alignment.artifacts import read_manifest, write_json
from alignment.config.launch import LaunchConfig
from alignment.config.stage import EvaluateConfig, ReportConfig
from alignment.errors import PREEMPTED, ArtifactError, StageError
from alignment.launcher import Command
from alignment.pipeline.plan import Action, Plan, PlannedStage
from alignment.pipeline.record import read_record
from alignment.pipeline.signals import INTERRUPTED, Terminated, termination_raises

ATTEMPT = "attempt.json"
_POLL_SECONDS = 0.5
_ENDED = {"preempted": PREEMPTED, "interrupted": INTERRUPTED}


@contextmanager
def announced(folder: Path, launch: LaunchConfig) -> Iterator[None]:
    """Leaves word of an attempt at a stage in its folder while the block runs, where other machines wait for one."""
    file = folder / ATTEMPT
    if launch.num_machines == 1:
        yield
        return
    write_json(file, {"attempt": uuid.uuid4().hex})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def follow(
    plan: Plan,
    launch: LaunchConfig,
    stages: Sequence[PlannedStage],
    *,
    console: Console,
    command_for: Callable[[LaunchConfig, Path], Command],
) -> int:
    """What every machine but the first does for these stages; returns the exit code of the run.

    Raises:
        StageError: the run failed on the first machine.
    """
    shared = [s for s in stages if s.action is not Action.reuse and not _is_of_one(s)]
    told = f"machine {launch.machine_rank} of {launch.num_machines}"
    try:
        with termination_raises():
            for stage in shared:
                console.print(f"{stage.name}: {told} waits for the first to start it", highlight=False)
                code = _follow_stage(plan, stage, launch, command_for)
                if code:
                    return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        return PREEMPTED
    console.print(f"{told} has no more to do", highlight=False)
    return 0


def _is_of_one(stage: PlannedStage) -> bool:
    return isinstance(stage.config, (EvaluateConfig, ReportConfig))


def _follow_stage(
    plan: Plan, stage: PlannedStage, launch: LaunchConfig, command_for: Callable[[LaunchConfig, Path], Command]
) -> int:
    """Answers attempts until the artifact is there; returns the exit code of a run that was stopped."""
    folder = plan.run_folder / stage.name
    answered, seen_running = "", False
    while read_manifest(stage.artifact) is None:
        attempt = _attempt(folder)
        if attempt not in ("", answered):
            answered, seen_running = attempt, True
            launcher.execute(
                command_for(launch, folder / "stage.yaml"),
                log=folder / f"log-{launch.machine_rank}.txt",
                on_poll=_nothing,
                grace_seconds=launch.grace_seconds,
            )
            continue
        state = _state(plan.run_folder)
        seen_running = seen_running or state == "running"
        if seen_running and state in _ENDED:
            return _ENDED[state]
        if seen_running and state == "failed":
            raise StageError(
                "the run failed on the first machine",
                where=f"stage {stage.name}",
                remedy=f"see there, or {folder / 'log.txt'} and {folder / f'log-{launch.machine_rank}.txt'}",
            )
        time.sleep(_POLL_SECONDS)
    return 0


def _attempt(folder: Path) -> str:
    try:
        return str(json.loads((folder / ATTEMPT).read_text(encoding="utf-8"))["attempt"])
    except FileNotFoundError:
        return ""


def _state(run_folder: Path) -> str:
    """How the first machine's run stands, as far as it has written anything."""
    try:
        return str(read_record(run_folder)["state"])
    except ArtifactError:
        return ""


def _nothing() -> None:
    """The first machine looks after the processes of all."""
