"""Translates settings into the trainer's arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from alignment.config.launch import Sharding
from alignment.config.model import Dtype
from alignment.config.stage import OptimConfig, Schedule
from alignment.core.errors import ConfigError
from alignment.training.adamw import adamw
from alignment.training.context import StageContext
from alignment.training.sharding import sharding_arguments

SCHEDULES = {
    Schedule.constant: "constant_with_warmup",
    Schedule.linear: "linear",
    Schedule.cosine: "cosine",
}


def common_arguments(optim: OptimConfig, context: StageContext, *, log_every: int, save_every: int) -> dict[str, Any]:
    """Keyword arguments that all ``TrainingArguments`` here share.

    A process gets its whole share of an optimiser batch at once, and splits it into micro-batches (MicroBatches).
    """
    return {
        **quiet_arguments(context),
        "per_device_train_batch_size": share_of(optim.batch_size, context.world_size),
        "activation_checkpointing": optim.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "num_train_epochs": optim.epochs,
        "max_steps": -1 if optim.max_steps is None else optim.max_steps,
        "learning_rate": optim.lr,  # adamw.py makes the optimiser itself
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "warmup_steps": optim.warmup_ratio,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "logging_steps": log_every,
        "save_steps": save_every,
    }


def optimizer_arguments(
    optim: OptimConfig, context: StageContext, model: nn.Module
) -> tuple[type[Any], dict[str, Any]]:
    """The optimiser's class and keyword arguments for the trained ``model``, as such a trainer takes them in
    ``optimizer_cls_and_kwargs``."""
    return adamw(model.parameters(), context, lr=optim.lr, eps=optim.adam_eps, moments=optim.moments)


def quiet_arguments(context: StageContext) -> dict[str, Any]:
    """Arguments that do not concern the optimiser: folders, seeds, precision, and silence."""
    return {
        **sharding_arguments(context),
        "output_dir": str(context.checkpoints),
        "seed": context.seed("trainer") % 2**32,
        # With sharded weights, sharding.py sets up autocast.
        "bf16": context.spec.model.dtype is Dtype.bfloat16 and context.spec.sharding is Sharding.none,
        "use_cpu": context.device.type == "cpu",
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,  # batches stay on the host (MicroBatches)
        "ddp_find_unused_parameters": False,
    }


def share_of(batch_size: int, world_size: int) -> int:
    """The number of rows of a global batch for one process.

    Raises:
        ConfigError: the batch is not divisible by the number of processes.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"a global batch of {batch_size} is not divisible by {world_size} processes",
            where="optim.batch_size",
            remedy=f"choose a multiple of {world_size}, or another launch.num_processes",
        )
    return batch_size // world_size
