"""What the stages of a plan would need, by a process that runs them on shadows (alignment/estimate.py)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from alignment.config.typed import to_plain
from alignment.core import hardware
from alignment.core.errors import StageError
from alignment.core.fingerprint import digest
from alignment.costs.devices import THIS
from alignment.pipeline.backends import environment, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.cost import FILE, RunCost, StageCost
from alignment.stages.base import RunsOn
from alignment.stages.registry import kind_of

_FOLDER = ".cost"


def estimate(
    plan: Plan,
    *,
    device: str,
    memory: float,
    trade: bool = False,
    as_run: bool = False,
    announce: Callable[[str], None],
) -> RunCost:
    """The cost of each stage on ``device`` with ``memory`` bytes, remembered for ``known``.

    With ``as_run`` the longest micro-batch counts only where the stage would try it before its first step.

    Raises:
        StageError: the process failed.
    """
    stages = [stage for stage in plan.stages if kind_of(stage.config).launch.runs_on is not RunsOn.driver]
    folder = _folder(plan) / f"{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    announce(
        f"running {', '.join(stage.name for stage in stages)} on shapes: some seconds each, and nothing is trained"
    )
    try:
        cost = _in_process(
            plan,
            stages,
            folder,
            ["--device", device, "--memory", str(memory), *["--trade"] * trade, *["--as-run"] * as_run],
        )
        for stage, own in zip(stages, cost.stages, strict=True):
            RunCost(device=device, memory=memory, stages=[own]).write(_file(plan, stage, device))
        return cost
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def known(plan: Plan, stage: PlannedStage, *, device: str) -> StageCost | None:
    """What an earlier call estimated for a stage with these settings, if there was one."""
    file = _file(plan, stage, device)
    return RunCost.read(file).stages[0] if file.is_file() else None


def pass_on(plan: Plan, stage: PlannedStage, folder: Path) -> None:
    """Copies what ``align plan --cost`` said of a stage on this machine to its folder of the run, for the report."""
    (folder / FILE).unlink(missing_ok=True)
    file = _file(plan, stage, THIS)
    if file.is_file():
        shutil.copyfile(file, folder / FILE)


def own_memory() -> float:
    """Bytes of this machine's memory that are free or can be freed."""
    return float(psutil.virtual_memory().available)


def _in_process(plan: Plan, stages: Sequence[PlannedStage], folder: Path, options: Sequence[str]) -> RunCost:
    launch = plan.config.launch
    files = [
        str(worker_protocol.write_stage_file(plan, stage, launch, git_commit="", folder=folder / "stages" / stage.name))
        for stage in stages
    ]
    argv = [sys.executable, "-m", "alignment.estimate", str(folder), *options]
    argv += ["--processes", str(max(1, launch.world_size)), "--stages", *files]
    variables = environment.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", ""))
    log = folder / "log.txt"
    code = processes.execute(
        Command(argv=tuple(argv), environment=variables), log=log, on_poll=lambda: None, grace_seconds=1.0
    )
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        raise StageError(f"the cost cannot be estimated: {' '.join(last)}", remedy="report this with the recipe")
    return RunCost.read(folder / FILE)


def _folder(plan: Plan) -> Path:
    return plan.output / "artifacts" / _FOLDER


def _file(plan: Plan, stage: PlannedStage, device: str) -> Path:
    return _folder(plan) / f"{digest([stage.fingerprint, to_plain(stage.config), device])}.json"
