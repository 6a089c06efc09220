"""A model made ready for decoding: attention that reads the cache where it stands, weights laid out for products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.models.attention import ATTENTION as FLAT_ATTENTION
from alignment.models.cache import ATTENTION, ROOM
from alignment.models.nf4 import Nf4Linear, computes_in, frozen_weight
from alignment.models.precision import products_dtype
from alignment.models.products import factors

Forward = Callable[[Tensor], Tensor]


@contextmanager
def decoding(model: PreTrainedModel, rows: int) -> Iterator[int]:
    """Makes the model ready for steps of about ``rows`` rows, and undoes that; yields the room for its ``RowsCache``.

    Linear layers get their weights in the dtype and, on CPU, in the layout of the products: without this autocast would
    convert a weight and oneDNN rearrange it at every step. A low-rank adapter stays beside its weight, because a sum
    rounded to bfloat16 would swallow small updates. It takes a second copy of those weights while it lasts.
    """
    implementation = model.config._attn_implementation
    ours = implementation in ("sdpa", FLAT_ATTENTION)
    before = _lay_out(model, rows)
    try:
        if ours:
            model.set_attn_implementation(ATTENTION)
        # Other functions than these may take allocated columns for filled ones.
        yield ROOM if ours or implementation == "eager" else 0
    finally:
        if ours:
            model.set_attn_implementation(implementation)
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _lay_out(model: nn.Module, rows: int) -> list[tuple[nn.Module, Any]]:
    """Gives linear layers a ``forward`` on a copy of their weight; returns them with the one that they had, or None."""
    found: list[tuple[nn.Module, Any]] = []
    inside: set[int] = set()
    for module in model.modules():
        forward = None if id(module) in inside else _laid_out(module, rows)
        if forward is not None:
            inside |= {id(part) for part in module.modules()}
            found.append((module, vars(module).get("forward")))
            module.forward = forward
    return found


def _laid_out(module: nn.Module, rows: int) -> Forward | None:
    """The layer as a function, or None where it is no linear layer or there is nothing to gain."""
    if isinstance(module, LoraLinear):
        base, pair = module.get_base_layer(), factors(module)
        if pair is None or not _is_whole(base):
            return None
        return _with_adapter(_product(base, rows), *pair, computes_in(base))
    if _is_whole(module) and (isinstance(module, Nf4Linear) or _gains(module.weight)):
        return _product(module, rows)
    return None


def _with_adapter(product: Forward, a: Tensor, b: Tensor, dtype: torch.dtype) -> Forward:
    low, up = a.to(dtype).T, b.to(dtype).T

    def forward(states: Tensor) -> Tensor:
        states = states.to(dtype)
        out = product(states)
        out.view(-1, out.shape[-1]).addmm_(states.reshape(-1, states.shape[-1]) @ low, up)
        return out

    return forward


def _is_whole(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that is not sharded or offloaded; in four bits only on a CPU, where there is room for a copy."""
    if isinstance(module, Nf4Linear):
        return module.weight.device.type == "cpu"
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.shape == (module.out_features, module.in_features)
        and weight.is_floating_point()
        and not weight.is_meta
    )


def _gains(weight: Tensor) -> bool:
    """Whether a copy in another dtype or layout saves anything."""
    return _is_laid_out(weight) or products_dtype(weight) != weight.dtype


def _product(module: nn.Linear, rows: int) -> Forward:
    """The linear layer as a function on its copy of the weight."""
    dtype, bias = computes_in(module), module.bias
    weight = frozen_weight(module, dtype).detach()
    held_bias = None if bias is None else bias.detach().to(dtype)
    if _is_laid_out(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), rows)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda states: product(states.to(dtype), packed, held_bias, "none", [], "")
    held = weight.to(dtype)
    return lambda states: nn.functional.linear(states.to(dtype), held, held_bias)


def _is_laid_out(weight: Tensor) -> bool:
    """bfloat16 products of oneDNN have a layout of their own for weights."""
    on_cpu = weight.device.type == "cpu" and products_dtype(weight) is torch.bfloat16
    return on_cpu and torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
