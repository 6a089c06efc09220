"""AdamW with rounded or master weights, and the arguments of transformers' trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.launch import Sharding
from alignment.config.model import Dtype
from alignment.config.optim import Moments, OptimConfig, Schedule
from alignment.core.errors import ConfigError
from alignment.costs.recorder import is_on_cpu
from alignment.training.context import StageContext
from alignment.training.sharding import sharding_arguments

BETAS = (0.9, 0.999)
CHUNK = 2**16
"""Weights that are updated at once; their seven float32 temporaries fit into a CPU's cache."""
CHUNK_OF_GPU = 2**24
"""The same on other devices, where calls cost more than memory. Not yet run on a GPU."""
CUT = 16
"""Bits of a float32 that bfloat16 lacks."""


def adamw(
    weights: Iterable[Tensor], context: StageContext, *, lr: float, eps: float, moments: Moments
) -> tuple[type[Any], dict[str, Any]]:
    """The optimiser's class and its keyword arguments, without weight decay, which each parameter group has.
    ``weights`` are those of the models that are trained, also the frozen ones. Raises ConfigError: moments in eight
    bits, for weights that are trained in bfloat16."""
    kwargs = {"lr": lr, "betas": BETAS, "eps": eps}
    in_bfloat16 = any(weight.requires_grad and weight.dtype is torch.bfloat16 for weight in weights)
    if context.spec.sharding is Sharding.none and in_bfloat16:
        if moments is not Moments.full:
            raise ConfigError(
                f"{moments.value!r} needs float32 weights, but some are trained in bfloat16",
                where="optim.moments",
                remedy="set it to full, or model.dtype to float32",
            )
        return RandomlyRoundedAdamW, {**kwargs, "seed": context.seed("rounding")}
    if moments is not Moments.full:
        import bitsandbytes

        kind = "AdamW8bit" if moments is Moments.eight_bit else "PagedAdamW8bit"
        return getattr(bitsandbytes.optim, kind), kwargs
    return torch.optim.AdamW, {**kwargs, "fused": True}


class RandomlyRoundedAdamW(torch.optim.Optimizer):
    """AdamW that computes in float32, with stochastic rounding of bfloat16 weights and their second moments. Weights of
    another dtype take the same steps without rounding. Random numbers depend on ``seed``, the step and the index of the
    parameter, so all processes draw the same ones, and a resumed run continues the same sequence. Weights must be
    contiguous."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for number, (group, parameter) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            moments = state["exp_avg"], state["exp_avg_sq"]
            random = _generator(parameter.device, group["seed"], number, int(state["step"]))
            size = CHUNK if is_on_cpu(parameter) else CHUNK_OF_GPU
            flat = [tensor.view(-1).split(size) for tensor in (parameter, parameter.grad.contiguous(), *moments)]
            for chunk in zip(*flat, strict=True):
                _step(chunk, group, float(state["step"]), random)


def _generator(device: torch.device, *numbers: int) -> torch.Generator:
    # torch's generator on the CPU takes 32 bits of a seed.
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


def _step(chunk: tuple[Tensor, ...], group: dict[str, Any], step: float, random: torch.Generator) -> None:
    """Updates a chunk: weights, gradients, first and second moments, all ``[weights]``."""
    weight, grad, first, second = chunk
    (beta1, beta2), grad = group["betas"], grad.float()
    mean = first.float().lerp_(grad, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = square.div(1 - beta2**step).sqrt_().add_(group["eps"])
    new_weight = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    new_weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))
    first.copy_(mean)
    if weight.dtype is not torch.bfloat16:
        weight.copy_(new_weight)
        second.copy_(square)
        return
    bits = torch.empty_like(new_weight, dtype=torch.int32).random_(generator=random)
    weight.copy_(rounded_at_random(new_weight, bits & (2**CUT - 1)))
    second.copy_(rounded_at_random(square, (bits >> CUT) << 1))  # the 15 bits that weights did not use


def rounded_at_random(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds ``values`` (float32, finite; overwritten) to one of the two neighbouring bfloat16 numbers. ``bits`` are
    random integers from 0 to 2¹⁶ − 1. The probabilities of the neighbours make the mean right."""
    whole = values.view(torch.int32)
    whole.add_(bits).bitwise_and_(-(2**CUT))
    return values


SCHEDULES = {Schedule.constant: "constant_with_warmup", Schedule.linear: "linear", Schedule.cosine: "cosine"}


def common_arguments(optim: OptimConfig, context: StageContext, *, log_every: int, save_every: int) -> dict[str, Any]:
    """Keyword arguments that all ``TrainingArguments`` here share. A process gets its whole share of an optimiser batch
    at once, and splits it into micro-batches (MicroBatches)."""
    return {
        **quiet_arguments(context),
        "per_device_train_batch_size": share_of(optim.batch_size, context.world_size),
        "activation_checkpointing": optim.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "num_train_epochs": optim.epochs,
        "max_steps": -1 if optim.max_steps is None else optim.max_steps,
        "learning_rate": optim.lr,  # optimizer.py makes the optimiser itself
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
    """The number of rows of a global batch for one process. Raises ConfigError: the batch is not divisible by the
    number of processes."""
    if batch_size % world_size:
        raise ConfigError(
            f"a global batch of {batch_size} is not divisible by {world_size} processes",
            where="optim.batch_size",
            remedy=f"choose a multiple of {world_size}, or another launch.num_processes",
        )
    return batch_size // world_size
