"""How a plan's stages are launched: how many processes, what they share out, and which of that cannot work."""

from __future__ import annotations

import dataclasses
import importlib.util

from alignment import launcher
from alignment.config.launch import LaunchConfig, Offload, Sharding
from alignment.config.optim import Moments
from alignment.config.stage import EvaluateConfig, StageConfig, Trained
from alignment.errors import ConfigError
from alignment.pipeline.plan import Action, Plan


def launch_of(plan: Plan) -> LaunchConfig:
    """The run's launch, its processes counted.

    Raises:
        ConfigError: it asks for a process on each GPU, and there is none; or a package is missing.
    """
    launch = launcher.with_processes(plan.config.launch, num_devices=launcher.count_devices())
    if launch.sharding.by_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{launch.sharding.value} is DeepSpeed's, which is not installed",
            where="launch.sharding",
            remedy="pip install 'deepspeed>=0.19,<0.20', or launch=ddp",
        )
    return launch


def refuse_paging_without_gpu(plan: Plan, *, num_devices: int) -> None:
    """bitsandbytes itself would go on without pages, and say so in a log.

    Raises:
        ConfigError: a stage that has to run pages its moments, and there is no GPU.
    """
    for stage in plan.stages:
        config = stage.config
        if num_devices or stage.action is Action.reuse or not isinstance(config, Trained):
            continue
        if config.optim.moments is Moments.paged_eight_bit:
            raise ConfigError(
                "pages are a GPU's, and this machine has none",
                where=f"stages.{stage.name}.optim.moments",
                remedy="take eight_bit",
            )


def of_stage(launch: LaunchConfig, config: StageConfig) -> LaunchConfig:
    """An evaluation is one process's work, which then has all the cores."""
    if isinstance(config, EvaluateConfig):
        return dataclasses.replace(
            launch, num_processes=1, num_machines=1, sharding=Sharding.none, offload=Offload.none
        )
    return launch


def refuse_uneven_batches(plan: Plan, launch: LaunchConfig) -> None:
    """A global batch is split evenly over processes; better said now than after the stages before.

    Raises:
        ConfigError: some stage that has to run cannot split its batch.
    """
    workers = launch.world_size
    uneven = [
        f"stages.{stage.name}.optim.batch_size: {stage.config.optim.batch_size} does not divide by {workers} processes"
        for stage in plan.stages
        if stage.action is not Action.reuse
        and isinstance(stage.config, Trained)
        and stage.config.optim.batch_size % workers
    ]
    if uneven:
        raise ConfigError("\n  ".join(uneven), remedy=f"choose multiples of {workers}, or another launch.num_processes")
