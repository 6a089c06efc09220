"""Cuts weights into the shares of the processes, one module at a time, so that no process holds a whole model. A weight
that is memory-mapped (alignment/models/assembly/weight_file.py) is copied right before it is cut. DeepSpeed and
accelerate would do the rest, but DeepSpeed writes into every weight before it cuts the first one, which would copy the
whole file (docs/design/0043)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import fsdp
from transformers import PreTrainedModel

from alignment.config.launch import Offload, Sharding
from alignment.models.assembly.weight_file import copy_weights, is_mapped
from alignment.training.context import StageContext
from alignment.training.sharding import moves_shares_to_host


def cut_frozen(model: PreTrainedModel, context: StageContext) -> None:
    """Cuts a frozen model's weights, if they are to be sharded; a trainer that is given the model leaves them so."""
    if context.spec.sharding is Sharding.zero3:
        _partition(model, context)
    elif context.spec.sharding is Sharding.fsdp:
        policy = fsdp.CPUOffloadPolicy() if moves_shares_to_host(context) else fsdp.OffloadPolicy()
        names = set(model._no_split_modules or ())
        for module in (*(layer for layer in model.modules() if type(layer).__name__ in names), model):
            copy_weights(module.parameters())
            fsdp.fully_shard(module, reshard_after_forward=True, offload_policy=policy)


@contextmanager
def cut_by_module(model: nn.Module, context: StageContext) -> Iterator[None]:
    """A ``with`` block in which a trainer begins, whose model is to be cut into shares."""
    if context.spec.sharding is Sharding.zero3:
        _partition(model, context)
    if context.spec.sharding is not Sharding.fsdp or not any(map(is_mapped, model.parameters())):
        yield
        return
    cut = fsdp.fully_shard
    fsdp.fully_shard = _copying_before(cut)  # accelerate looks it up for each model that it cuts
    try:
        yield
    finally:
        fsdp.fully_shard = cut


def _copying_before(cut: Any) -> Any:
    @functools.wraps(cut)
    def copied_and_cut(modules: nn.Module | list[nn.Module], *args: Any, **kwargs: Any) -> Any:
        for module in [modules] if isinstance(modules, nn.Module) else modules:
            copy_weights(module.parameters())
        return cut(modules, *args, **kwargs)

    return copied_and_cut


def _partition(model: nn.Module, context: StageContext) -> None:
    """Cuts the weights as DeepSpeed's engine would, in the same order; it then moves nothing to its device."""
    import deepspeed

    offloads = context.spec.offload is Offload.weights
    settings = {
        "dtype": torch.float32,
        "remote_device": "cpu" if offloads else None,
        "pin_memory": offloads and context.device.type == "cuda",
    }
    cut = None
    parameters: list[Any] = [parameter for parameter in model.parameters() if not hasattr(parameter, "ds_id")]
    for parameter in parameters:
        if is_mapped(parameter):
            copy_weights([parameter])
        else:  # DeepSpeed writes the main process's numbers into it, and a frozen weight may be mapped too
            parameter.data = parameter.data.clone()
        if cut is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), **settings)
            cut = parameter.convert_to_zero_parameters
        else:
            cut([parameter])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(context.device)
