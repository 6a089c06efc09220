"""AdamW (Loshchilov and Hutter 2019), also with moments in eight bits, and for weights without a float32 master copy:
those of full training without masters, and of modules that are trained whole beside an adapter.

In bfloat16, rounding to the nearest number loses a step of less than about 1/256 of a weight, and Adam's second moment,
which changes by a thousandth per step, never changes at all. Stochastic rounding, up or down in proportion to the
remainder, is right on average (Gupta et al. 2015), so small steps add up, with noise. The first moment is rounded to
the nearest number: a tenth of it is new in each step, so its error stays within a few per cent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from alignment.config.launch import Sharding
from alignment.config.stage import Moments
from alignment.core.errors import ConfigError
from alignment.costs.recorder import is_on_cpu
from alignment.training.context import StageContext

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

    ``weights`` are those of the models that are trained, also the frozen ones.

    Raises:
        ConfigError: moments in eight bits, for weights that are trained in bfloat16.
    """
    kwargs = {"lr": lr, "betas": BETAS, "eps": eps}
    if context.spec.sharding is Sharding.none and _any_in_bfloat16(weights):
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


def _any_in_bfloat16(weights: Iterable[Tensor]) -> bool:
    return any(weight.requires_grad and weight.dtype is torch.bfloat16 for weight in weights)


class RandomlyRoundedAdamW(torch.optim.Optimizer):
    """AdamW that computes in float32, with stochastic rounding of bfloat16 weights and their second moments.

    Weights of another dtype take the same steps without rounding. Random numbers depend on ``seed``, the step and the
    index of the parameter, so all processes draw the same ones, and a resumed run continues the same sequence. Weights
    must be contiguous.
    """

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
    """Rounds ``values`` (float32, finite; overwritten) to one of the two neighbouring bfloat16 numbers.

    ``bits`` are random integers from 0 to 2¹⁶ − 1. The probabilities of the neighbours make the mean right.
    """
    whole = values.view(torch.int32)
    whole.add_(bits).bitwise_and_(-(2**CUT))
    return values
