"""How a plan's stages are launched; refuses what this machine cannot launch before anything starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence

from alignment.config.faults import Fault, refuse
from alignment.config.launch import LaunchConfig, LocalBackend, Offload, Sharding
from alignment.config.optim import Moments, OptimConfig
from alignment.config.stage import StageConfig
from alignment.core import hardware
from alignment.core.errors import ConfigError
from alignment.core.hardware import TRAINING_LIBRARIES
from alignment.pipeline.backends import command, slurm
from alignment.pipeline.plan import row_counts
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.pipeline.plan.scorer_checks import refuse_missing_keys
from alignment.stages.base import RunsOn
from alignment.stages.registry import as_trained, kind_of


def of_stage(launch: LaunchConfig, config: StageConfig, *, num_devices: int) -> LaunchConfig:
    """A stage's launch with its number of processes. A stage with one process has all the cores. Raises ConfigError: it
    asks for a process on each GPU, and there is none."""
    runs_on = kind_of(config).launch.runs_on
    if runs_on is RunsOn.processes:
        return command.with_processes(launch, num_devices=num_devices)
    plain = dataclasses.replace(launch, sharding=Sharding.none, offload=Offload.none)
    if runs_on is RunsOn.replicas:
        return command.with_processes(plain, num_devices=num_devices)
    return dataclasses.replace(plain, num_processes=1, backend=LocalBackend())


def devices_for(launch: LaunchConfig) -> int:
    """The number of GPUs that stages will find: those of a job, or of this machine."""
    submission = slurm.submission(launch)
    return hardware.count_devices() if submission is None else submission.gpus


def why_not_here(plan: Plan) -> str:
    """Why this machine cannot start the stages that have to run, or an empty string; a plan may be meant for another
    machine."""
    launch = plan.config.launch
    try:
        refuse_what_cannot_start(launch, plan.stages, num_devices=devices_for(launch))
    except ConfigError as error:
        return str(error)
    return ""


def refuse_what_cannot_start(launch: LaunchConfig, stages: Sequence[PlannedStage], *, num_devices: int) -> None:
    """Refuses stages that cannot be launched, before any stage runs. ``num_devices`` counts the GPUs they will find.
    Raises ConfigError: some stage that has to run cannot be launched with these settings."""
    faults: list[Fault] = []
    for stage in stages:
        if not stage.has_to_run or kind_of(stage.config).in_driver:
            continue
        own = of_stage(launch, stage.config, num_devices=num_devices)
        _refuse_missing_package(own)
        command.chosen_launcher(own, num_devices=num_devices)
        kind_of(stage.config).launch.check_machine(stage.config, f"stages.{stage.name}")
        refuse_missing_keys(stage.config, f"stages.{stage.name}")
        if (trained := as_trained(stage.config)) is not None:
            faults += _size_faults(stage, own.world_size)
            # bitsandbytes itself would only log this and continue without paging.
            if trained.optim.moments is Moments.paged_eight_bit and not num_devices:
                message = "paging needs a GPU, but there is none; use eight_bit"
                faults.append(Fault(where=f"stages.{stage.name}.optim.moments", message=message))
    refuse(faults)


def refuse_sizes(plan: Plan) -> None:
    """Refuses batches, prompts and processes that do not work together on any machine. Raises ConfigError: some stage
    that has to run cannot be split over its processes, or has too little data."""
    launch = plan.config.launch
    waiting = [stage for stage in plan.stages if stage.has_to_run]
    if launch.num_processes:  # otherwise the number depends on the machine
        refuse([fault for stage in waiting for fault in _size_faults(stage, launch.world_size)])


def _size_faults(stage: PlannedStage, processes: int) -> Iterator[Fault]:
    config, where = as_trained(stage.config), f"stages.{stage.name}"
    if config is None:
        return
    kind = kind_of(config)
    yield from kind.launch.size_faults(config, processes, where)
    if isinstance(config.optim, OptimConfig) and config.optim.batch_size % processes:
        remedy = f"choose a multiple of {processes}, or another launch.num_processes"
        message = f"{config.optim.batch_size} is not divisible by {processes} processes; {remedy}"
        yield Fault(where=f"{where}.optim.batch_size", message=message)
    yield from row_counts.faults(config, stage.seen, where=where)


def _refuse_missing_package(launch: LaunchConfig) -> None:
    if missing := [library for library in TRAINING_LIBRARIES if importlib.util.find_spec(library) is None]:
        message = f"stages need {', '.join(missing)}, which are not installed for {sys.executable}"
        remedy = "install alignment-pipeline without --no-deps, or run align in the environment that has them"
        raise ConfigError(message, where="launch", remedy=remedy)
    if launch.sharding.by_deepspeed and importlib.util.find_spec("deepspeed") is None:
        message = f"{launch.sharding.value} needs DeepSpeed, which is not installed"
        raise ConfigError(message, where="launch.sharding", remedy="pip install 'deepspeed>=0.19,<0.20', or launch=ddp")
