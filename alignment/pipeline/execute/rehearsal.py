"""Tries before the first stage what could stop a later one (alignment/rehearse.py), in a process with a deadline.

``align plan`` does not do this: it runs none of the user's code and needs no tokenizer. The stage that runs first is
left out, because it would fail at once anyway. So are Slurm jobs, whose nodes are not this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.config.launch import LauncherKind
from alignment.config.model import AdapterKind
from alignment.config.stage import StageConfig
from alignment.core import hardware
from alignment.core.artifacts import POLICY
from alignment.core.errors import StageError
from alignment.pipeline.backends import command, environment, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.forking import ForkServer
from alignment.pipeline.execute import rehearsed, worker_protocol
from alignment.pipeline.plan import references, scorer_checks
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.stages.registry import as_trained, kind_of

_FOLDERS = ".rehearsal-"
_CHECKED = {
    rehearsed.ROWS: "rows of",
    rehearsed.SCORERS: "scorers of",
    rehearsed.MODEL: "requirements of",
}
"""What is announced of the stages with each part."""
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
        AlignmentError: the error that a stage would raise: rows that cannot be learned from, a scorer that fails, or a
            base model that does not fit.
        StageError: no answer within ``launch.hang_seconds``.
    """
    waiting = [stage for stage in stages if stage.has_to_run][1:]
    waiting = [stage for stage in waiting if not stage.unmade]  # there is nothing to try yet
    has_part: dict[str, Callable[[StageConfig], object]] = {
        rehearsed.ROWS: lambda config: _learns_by_own_tokenizer(config, plan.config.stages),
        rehearsed.SCORERS: scorer_checks.functions,
        rehearsed.MODEL: lambda config: _has_model_check(config, plan.config.stages),
    }
    parts = {
        part: [stage for stage in waiting if has(stage.config) and not rehearsed.is_known(plan, stage, part=part)]
        for part, has in has_part.items()
    }
    if not any(parts.values()):
        return
    announce(_announcement(parts))
    for note in _try(plan, parts, server):
        announce(note)
    for part, stages_of_part in parts.items():
        for stage in stages_of_part:
            rehearsed.remember(plan, stage, part=part)


def _announcement(parts: Mapping[str, Sequence[PlannedStage]]) -> str:
    named = " and ".join(
        f"{_CHECKED[part]} {', '.join(stage.name for stage in stages)}" for part, stages in parts.items() if stages
    )
    return f"checking {named} before training (takes ten seconds or more, once for these settings and data)"


def _try(plan: Plan, parts: Mapping[str, Sequence[PlannedStage]], server: ForkServer | None) -> list[str]:
    """What was noted; an error is raised."""
    folder = _new_folder(plan)
    argv = [sys.executable, "-m", "alignment.rehearse", str(folder)]
    for part, stages in parts.items():
        argv += [f"--{part}", *_files(plan, stages, folder)]
    code = processes.execute(
        Command(argv=tuple(argv), environment=_environment(plan)),
        log=folder / "log.txt",
        on_poll=_deadline(plan, parts[rehearsed.SCORERS]),
        grace_seconds=1.0,
        server=server,
    )
    kinds = [stage.config.kind for stages in parts.values() for stage in stages]
    worker_protocol.raise_for_status(folder, code=code, stage="rehearsal", kinds=kinds)
    notes = worker_protocol.notes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return notes


def _new_folder(plan: Plan) -> Path:
    """An empty folder of its own: the process of a killed driver may still write into the older one."""
    plan.run_folder.mkdir(parents=True, exist_ok=True)
    for older in plan.run_folder.glob(f"{_FOLDERS}*"):
        shutil.rmtree(older, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=_FOLDERS, dir=plan.run_folder))


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
    return trained is not None and kind_of(config).learning.rehearsed and _is_of_base(trained.init, stages)


def _has_model_check(config: StageConfig, stages: dict[str, StageConfig]) -> bool:
    """Whether the stage trains an adapter, or its kind has a check; one that reads the run's base model is left out if
    the stage has a policy that a stage of this run made from another model."""
    trained, kind = as_trained(config), kind_of(config)
    if kind.rehearse and not kind.rehearse_reads_base:
        return True
    has_adapter = trained is not None and trained.adapter.kind is not AdapterKind.full
    policies = [slot for slot in references.slots(config) if POLICY in slot.takes]
    of_stages = [slot.ref for slot in policies if references.stage_of(slot) is not None]
    return (has_adapter or bool(kind.rehearse)) and all(_is_of_base(ref, stages) for ref in of_stages)


def _is_of_base(ref: str, stages: dict[str, StageConfig]) -> bool:
    """Whether a policy is the run's base model, or began as that."""
    while (name := ref.removeprefix("stage:")) in stages:
        trained = as_trained(stages[name])
        if trained is None:
            return False
        ref = trained.init
    return ref in UNTRAINED_ARMS
