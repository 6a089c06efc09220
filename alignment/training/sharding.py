"""Sharded weights, gradients and optimiser state, and how stages work with them. Every process loads the whole model,
and its trainer shards it at the start. From then on a sharded weight (ZeRO-3, FSDP) is complete only while its module
is called. Code that reads weights without a call must gather them: ``gathered`` for passes without gradients,
``whole_state`` for saving (docs/design/0009)."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer
from transformers.integrations import unset_hf_deepspeed_config

from alignment.config.launch import Offload, Sharding
from alignment.core.errors import AlignmentError
from alignment.core.files import shipped
from alignment.models.assembly.heads import ActorCritic
from alignment.models.assembly.load import compute_in
from alignment.models.assembly.weight_file import copy_weights, is_mapped
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.head import read_in_calls_only
from alignment.training.checkpoints import WHOLE
from alignment.training.context import StageContext
from alignment.training.shard_together import whole_units

_SHARED_MEMORY_SUMS = "deepspeed_shm_comm"
_PATIENCE = timedelta(days=7)
"""Longer than any wait for a process that asks a server. It is the driver that ends a stage without signs of life."""
T = TypeVar("T")


def begin(context: StageContext) -> None:
    """Makes the process group before any model is loaded. Stages communicate before their trainers do, and DeepSpeed
    would otherwise assume a single process."""
    on_gpu = context.heartbeat.on_gpu = context.device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    if moves_shares_to_host(context):
        backend = "cuda:nccl,cpu:gloo"  # shares on the host are added up there
    if on_gpu:
        torch.cuda.set_device(context.device)
    if context.spec.sharding.by_deepspeed:
        import deepspeed

        # Its sums through shared memory would have to be compiled, and the machine may lack a compiler.
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_SUMS] = False
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=_PATIENCE)
    elif context.world_size > 1:
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)


def everyones(value: T) -> list[T]:
    """The value of each process, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def shared(make: Callable[[], T]) -> list[T]:
    """The value that each process makes, by rank. If ``make`` fails on some of them, all raise the error of the first
    that failed, with its rank. Otherwise the others would wait for a process that has ended."""
    value, error = None, None
    try:
        value = make()
    except AlignmentError as failed:
        error = failed
    outcomes: list[Any] = everyones((value, error))
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            failure.rank = rank
            raise failure
    return [made for made, _ in outcomes]


def own_of_all(make: Callable[[], T]) -> T:
    """The value that this process makes; like ``shared``, but only errors travel."""
    own: list[T] = []
    shared(lambda: own.append(make()))
    return own[0]


def moves_shares_to_host(context: StageContext) -> bool:
    """Whether FSDP keeps its shares in the host's memory. On a CPU they are there anyway."""
    spec = context.spec
    return spec.sharding is Sharding.fsdp and spec.offload is Offload.weights and context.device.type != "cpu"


def layout(context: StageContext) -> str:
    """The layout of weights and optimiser state in a checkpoint, whose manifest has these words: they never change."""
    sharding = context.spec.sharding
    return WHOLE if sharding is Sharding.none else f"shares of {context.world_size} processes ({sharding.value})"


def sharding_arguments(context: StageContext) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments``, to be made after the models are loaded, else these would be
    sharded."""
    sharding, offload = context.spec.sharding, context.spec.offload
    if sharding is Sharding.none:
        return {}
    if sharding is Sharding.fsdp:
        settings = json.loads((shipped("launch") / "fsdp" / "fsdp.json").read_text(encoding="utf-8"))
        return {"fsdp": True, "fsdp_config": settings | {"cpu_offload": moves_shares_to_host(context)}}
    settings = json.loads((shipped("launch") / "deepspeed" / f"{sharding.value}.json").read_text(encoding="utf-8"))
    if offload is not Offload.none:
        settings["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": context.device.type == "cuda",
        }
    if offload is Offload.weights:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": context.device.type == "cuda"}
    return {"deepspeed": settings}


def prepare(model: nn.Module, context: StageContext, *models: PreTrainedModel) -> None:
    """Prepares a model for sharding, after its fast forward is installed. ``models`` are the language models and
    scorers in it, without wrappers; by default the model itself. Products use an autocast that this module sets up,
    because those of DeepSpeed and FSDP would round adapters."""
    sharding = context.spec.sharding
    if sharding is Sharding.none:
        return
    if isinstance(model, ActorCritic):
        model.joint_backward = True  # neither expects a forward pass in the middle of a backward pass
    compute_in(model, context.spec.model.dtype, context.device)
    for language_model in models or (unwrapped(model),):
        read_in_calls(language_model, context)


def read_in_calls(model: PreTrainedModel, context: StageContext) -> None:
    """Makes sure that the sharded weights of a language model or scorer are only read inside calls."""
    sharding = context.spec.sharding
    head: nn.Module | None = model.get_output_embeddings()
    if head is not None and sharding.of_weights:
        read_in_calls_only(head)
    if sharding is Sharding.zero3:
        _gather_by_layer(model)


def _gather_by_layer(model: PreTrainedModel) -> None:
    """Gathers a layer's weights together, because its blocks read those of its modules (models/kernels/blocks.py). The
    first layer's input must require a gradient, because DeepSpeed reduces a layer's gradients when its input gets
    one."""
    from deepspeed.utils import set_z3_leaf_modules

    names = set(model._no_split_modules or ())
    kinds = {type(module) for module in model.modules() if type(module).__name__ in names}
    if kinds:
        set_z3_leaf_modules(model, list(kinds))
        model.enable_input_require_grads()


def load_whole_again() -> None:
    """After the last step: models that are loaded from now on are whole. Under ZeRO-3 they would be read in shards."""
    unset_hf_deepspeed_config()


@contextlib.contextmanager
def gathered(trainer: Trainer, *models: nn.Module) -> Iterator[None]:
    """Gathers whole weights on every process, for passes without gradients that do not call their modules. Every
    process must enter the block."""
    if trainer.is_fsdp_enabled:
        with whole_units(*models):
            yield
        return
    engine = getattr(trainer, "deepspeed", None)
    if engine is None or engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


def whole(held: Tensor) -> Tensor:
    """A weight, gathered if it is sharded; every process must call this."""
    if hasattr(held, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([held]):
            return held.detach().clone()
    return held.full_tensor() if isinstance(held, DTensor) else held


@torch.no_grad()
def put(held: Tensor, values: Tensor | None) -> None:
    """Sets a weight, or this process's shard, to the values of the main process; every process must call this."""
    if hasattr(held, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([held], modifier_rank=0):
            if values is not None:
                held.copy_(values)
        return
    if isinstance(held, DTensor):
        local = held.to_local()
        whole_weight = torch.empty(held.shape, dtype=held.dtype, device=local.device)
        if values is not None:
            whole_weight.copy_(values)
        local.copy_(distribute_tensor(whole_weight, held.device_mesh, held.placements).to_local())
        return
    if values is not None:
        held.copy_(values)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(held.data, src=0)


def whole_state(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """A model's whole weights on the CPU; empty except on the main process. Every process must call this. Weights are
    gathered one at a time."""
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    known: dict[int, Tensor] = {}  # a tied weight stays one tensor
    weights: dict[str, Tensor] = {}
    for name, held in model.named_parameters(remove_duplicate=False):
        if trained_only and not held.requires_grad:
            continue
        if id(held) not in known:
            gathered_weight = whole(held).detach()
            known[id(held)] = gathered_weight.cpu().clone() if main else gathered_weight.new_empty(0)
        if main:
            weights[name] = known[id(held)]
    return weights


def leave_frozen_out(engine: Any) -> None:
    """Makes DeepSpeed's engine save checkpoints without frozen weights, which are the base's. transformers does so only
    if the whole model is PEFT's, and not for weights that two models share."""
    state_dict, load = engine.module_state_dict, engine.load_checkpoint
    named = engine.module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}

    def state_of_trained(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: held for name, held in state_dict(*args, **kwargs).items() if name not in frozen}

    def load_trained(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "load_module_strict": False})

    engine.module_state_dict = state_of_trained
    engine.load_checkpoint = load_trained


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a shard of the weights."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


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
