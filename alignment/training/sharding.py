"""Weights, gradients and optimiser state shared out among processes: what a stage of ours must know of it.

A model is loaded whole by every process and shared out when its trainer begins. From then on a weight that is shared
out (ZeRO-3, FSDP) is there only while the module that holds it is called, so whatever reads weights without a call
needs them gathered: ``gathered`` for passes without gradients, ``whole_state`` for saving (docs/design/0009).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from alignment.config.launch import Offload, Sharding
from alignment.core.resources import shipped
from alignment.models.assembly.actor_critic import ActorCritic
from alignment.models.assembly.load import compute_in
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.head import answer_labels
from alignment.training.checkpoints import WHOLE
from alignment.training.context import StageContext

_SHARED_MEMORY_SUMS = "deepspeed_shm_comm"
T = TypeVar("T")


def begin(context: StageContext) -> None:
    """Makes the process group, before any model is loaded: stages meet before their trainers do, and DeepSpeed would
    take itself to be alone."""
    on_gpu = context.pulse.on_gpu = context.device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(context.device)
    if context.spec.sharding.by_deepspeed:
        import deepspeed

        # Its sums through shared memory would be compiled first, for which a machine may lack a compiler.
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_SUMS] = False
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    elif context.world_size > 1:
        torch.distributed.init_process_group(backend)


def everyones(mine: T) -> list[T]:
    """What each process has, by rank."""
    if not torch.distributed.is_initialized():
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def layout(context: StageContext) -> str:
    """How weights and the optimiser's state lie in a checkpoint."""
    sharding = context.spec.sharding
    return WHOLE if sharding is Sharding.none else f"shares of {context.world_size} processes ({sharding.value})"


def sharding_arguments(context: StageContext) -> dict[str, Any]:
    """What ``TrainingArguments`` is told; to be made after the models, which would otherwise be loaded in shares."""
    sharding, offload = context.spec.sharding, context.spec.offload
    if sharding is Sharding.none:
        return {}
    if sharding is Sharding.fsdp:
        told = json.loads((shipped("launch") / "fsdp" / "fsdp.json").read_text(encoding="utf-8"))
        return {"fsdp": True, "fsdp_config": told | {"cpu_offload": offload is Offload.weights}}
    told = json.loads((shipped("launch") / "deepspeed" / f"{sharding.value}.json").read_text(encoding="utf-8"))
    if offload is not Offload.none:
        told["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": context.device.type == "cuda"}
    if offload is Offload.weights:
        told["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": context.device.type == "cuda"}
    return {"deepspeed": told}


def prepare(model: nn.Module, context: StageContext, *parts: PreTrainedModel) -> None:
    """After its fast forward was put on: lets a model be shared out. ``parts`` are the language models and scorers in
    it, without wrappers; the model itself where there are none.

    Its products are then made under an autocast of our own. DeepSpeed and FSDP have others, that would round adapters.
    """
    sharding = context.spec.sharding
    if sharding is Sharding.none:
        return
    if isinstance(model, ActorCritic):
        model.one_backward = True  # DeepSpeed does not expect a forward pass in the middle of a backward pass
    compute_in(model, context.spec.model.dtype, context.device)
    for part in parts or (unwrapped(model),):
        read_in_calls(part, context)


def read_in_calls(model: PreTrainedModel, context: StageContext) -> None:
    """Lets the weights of a language model or scorer, once they are shared out, be read inside calls only."""
    sharding = context.spec.sharding
    head: nn.Module | None = model.get_output_embeddings()
    if head is not None and sharding in (Sharding.zero3, Sharding.fsdp):
        answer_labels(head)
    if sharding is Sharding.zero3:
        _gather_by_layer(model)


def _gather_by_layer(model: PreTrainedModel) -> None:
    """A layer's weights come together, because its blocks read those of the modules in it (models/kernels/blocks.py).

    What goes into the first layer must want a gradient: DeepSpeed takes a layer's gradients when its input has one.
    """
    from deepspeed.utils import set_z3_leaf_modules

    names = set(model._no_split_modules or ())
    kinds = {type(module) for module in model.modules() if type(module).__name__ in names}
    if kinds:
        set_z3_leaf_modules(model, list(kinds))
        model.enable_input_require_grads()


@contextlib.contextmanager
def gathered(trainer: Trainer, *models: nn.Module) -> Iterator[None]:
    """Whole weights on every process, for passes without gradients that read them without calling their modules.

    Every process must enter.
    """
    engine = getattr(trainer, "deepspeed", None)
    if engine is None or engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    shared_out = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(shared_out):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


def whole(held: Tensor) -> Tensor:
    """A weight, gathered where this process holds a share of it; every process must call this."""
    if hasattr(held, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([held]):
            return held.detach().clone()
    return held.full_tensor() if isinstance(held, DTensor) else held


@torch.no_grad()
def put(held: Tensor, values: Tensor | None) -> None:
    """Gives a weight, or this process's share of it, the values that the main process has; all must call this."""
    if hasattr(held, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([held], modifier_rank=0):
            if values is not None:
                held.copy_(values)
        return
    if values is not None:
        held.copy_(values)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(held.data, src=0)


def whole_state(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """A model's weights, each of them whole, on the CPU; empty on all but the main process.

    Every process must call this. One weight is gathered at a time.
    """
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    known: dict[int, Tensor] = {}  # a tied weight stays one tensor
    found: dict[str, Tensor] = {}
    for name, held in model.named_parameters(remove_duplicate=False):
        if trained_only and not held.requires_grad:
            continue
        if id(held) not in known:
            gathered_weight = whole(held).detach()
            known[id(held)] = gathered_weight.cpu().clone() if main else gathered_weight.new_empty(0)
        if main:
            found[name] = known[id(held)]
    return found


def leave_frozen_out(engine: Any) -> None:
    """Checkpoints of DeepSpeed's engine without frozen weights, which are the base's.

    transformers asks it for that only where the whole model is PEFT's, and leaves those that two parts share.
    """
    state_dict, load = engine.module_state_dict, engine.load_checkpoint
    named = engine.module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}

    def state_of_trained(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: held for name, held in state_dict(*args, **kwargs).items() if name not in frozen}

    def load_trained(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "load_module_strict": False})

    engine.module_state_dict = state_of_trained
    engine.load_checkpoint = load_trained


def is_shared_out(model: nn.Module) -> bool:
    """Whether a process holds a share of the weights only."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())
