"""A linear layer with low-rank adapters as one function: y = x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3). PEFT's
layer takes nine passes over activations, several of which autograd stores. Here the scale is multiplied into the small
factor, the sum is part of the matrix product, and only ``x`` and ``x Aᵀ`` are stored. If ``x`` has an origin, only what
that reads is stored in its place. Several adapters on one layer become one adapter with the sum of their ranks. Layers
that read the same input (queries, keys and values; gate and up) share the products with small factors, whose few
columns would leave a processor idle. DoRA multiplies each output, without the bias, by m / ‖W + s·B·A‖ (nf4.py). The
product is stored once more then. It is multiplied as z + z · (m / ‖…‖ − 1), because bfloat16 numbers around 1 are too
far apart for a factor that is learned."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.models.assembly.modules import products_dtype
from alignment.models.kernels.nf4 import Nf4Linear, change_of_magnitude, computes_in, frozen_product, frozen_weight

_NAME = "alignment_origin"


@dataclass(frozen=True, slots=True)
class Origin:
    """``compute(*inputs)`` is the tensor that carries it, as long as nobody changes that in place, which would raise
    PyTorch's count of its versions."""

    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def with_origin(tensor: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The same tensor, which carries its origin from now on if gradients flow through it. Autograd then stores
    ``inputs`` anyway, for the function that computed the tensor, and refuses changes to them."""
    if tensor.requires_grad:
        setattr(tensor, _NAME, Origin(compute, tuple(states.detach() for states in inputs), tensor._version))
    return tensor


def origin_of(tensor: Tensor) -> Origin | None:
    """What it can be computed from; None if it must be stored, or nothing will be."""
    origin: Origin | None = getattr(tensor, _NAME, None)
    is_valid = origin is not None and origin.version == tensor._version
    return origin if is_valid and torch.is_grad_enabled() else None


def to_store(ctx: Any, x: Tensor, origin: Origin | None) -> tuple[Tensor, ...]:
    """What a function stores of its input ``x [..., width]``, for ``input_again`` in its backward pass."""
    ctx.compute, ctx.dtype = None if origin is None else origin.compute, x.dtype
    return (x,) if origin is None else origin.inputs


def input_again(ctx: Any, stored: Sequence[Tensor]) -> Tensor:
    """``[tokens, width]``: the function's input, from what ``to_store`` returned."""
    x: Tensor = stored[0] if ctx.compute is None else ctx.compute(*stored)
    return x.to(ctx.dtype).reshape(-1, x.shape[-1])


def are_whole(x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
    """Whether the layers are plain ones with weights that are trained now, and can read ``x``."""
    if not torch.is_grad_enabled() or not all(_is_whole(layer) for layer in layers):
        return False
    return torch.is_autocast_enabled(x.device.type) or all(layer.weight.dtype == x.dtype for layer in layers)


def _is_whole(layer: nn.Module) -> bool:
    """Whether it is a plain layer that is trained; one whose forward was replaced, as by offloading, must be called."""
    return type(layer) is nn.Linear and layer.weight.requires_grad and "forward" not in vars(layer)


def whole_products(x: Tensor, layers: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of the layers for ``x [..., in]``, each ``[..., out]``."""
    weights, biases = (tuple(getattr(layer, name) for layer in layers) for name in ("weight", "bias"))
    outputs: tuple[Tensor, ...] = _WholeProducts.apply(x, products_dtype(x), origin_of(x), *weights, *biases)
    return outputs


class _WholeProducts(torch.autograd.Function):
    """Products in ``dtype``; ``trained`` are the weights ``[out, in]`` of all layers, then their biases ``[out]`` or
    None. Gradients are summed as autograd does it: in the input's dtype, those of the last layer first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, origin: Origin | None, *trained: Any) -> tuple[Tensor, ...]:
        count = len(trained) // 2
        weights, biases = trained[:count], trained[count:]
        read = x.to(dtype)
        ctx.save_for_backward(*weights, *to_store(ctx, read, origin))
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        with torch.autocast(x.device.type, enabled=False):
            return tuple(
                nn.functional.linear(read, weight.to(dtype), None if bias is None else bias.to(dtype))
                for weight, bias in zip(weights, biases, strict=True)
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stored, count = ctx.saved_tensors, len(grads)
        weights, x = stored[:count], input_again(ctx, stored[count:])
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        needs_x, _, _, *needs = ctx.needs_input_grad
        of_weights = [
            (grad.T @ x).to(weight.dtype) if need else None
            for grad, weight, need in zip(flat, weights, needs[:count], strict=True)
        ]
        of_biases = [
            grad.sum(0).to(dtype) if need else None
            for grad, dtype, need in zip(flat, ctx.bias_dtypes, needs[count:], strict=True)
        ]
        of_x = (
            (grad @ weight.to(grad.dtype)).to(ctx.input_dtype)
            for grad, weight in zip(reversed(flat), reversed(weights), strict=True)
        )
        grad_x = functools.reduce(torch.add, of_x).view(ctx.shape) if needs_x else None
        return grad_x, None, None, *of_weights, *of_biases


def fuse_adapters(model: PeftModel) -> None:
    """Replaces the forward of every plain LoRA or DoRA layer by one function; other layers stay as they are."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) in (nn.Linear, Nf4Linear):
            module.forward = types.MethodType(_forward, module)


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _plain_adapters(self):
        return LoraLinear.forward(self, x, *args, **kwargs)
    return _together(x, (self,))[0]


Products = Callable[[Tensor], tuple[Tensor, ...]]
"""Computes the outputs of several layers for one input."""
JOINT = "alignment_products"
"""The attribute in which the first of several layers holds a function for all, while weights are prepacked
(layout.py)."""


def products(x: Tensor, layers: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input, by one function if all of them are trained whole, or have plain
    low-rank adapters."""
    joint: Products | None = vars(layers[0]).get(JOINT)
    if joint is not None:
        return joint(x)
    if any(is_hooked(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    if are_whole(x, layers):
        return whole_products(x, layers)
    if all(_is_fused(layer) and _plain_adapters(layer) for layer in layers):
        return _together(x, layers)
    return tuple(layer(x) for layer in layers)


def is_hooked(layer: nn.Module) -> bool:
    """Whether the layer has hooks, as PEFT registers them for rows with different adapters."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)


def _is_fused(layer: nn.Module) -> bool:
    return type(layer) is LoraLinear and getattr(vars(layer).get("forward"), "__func__", None) is _forward


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """``a [rank, in]`` and ``b [out, rank]`` of a layer, and ``scale``, by which their product is multiplied.
    ``change``, with DoRA, is ``[out]``: an output without its bias is multiplied by 1 + change."""

    a: Tensor
    b: Tensor
    scale: float
    change: Tensor | None


def _together(x: Tensor, layers: tuple[Any, ...]) -> tuple[Tensor, ...]:
    adapters = [_low_rank(layer, _plain_adapters(layer)) for layer in layers]
    bases = tuple(layer.base_layer for layer in layers)
    scales = tuple(adapter.scale for adapter in adapters)
    trained = itertools.chain(*((adapter.a, adapter.b, adapter.change) for adapter in adapters))
    return _LowRankProducts.apply(x.to(computes_in(bases[0])), origin_of(x), bases, scales, *trained)


def has_plain_adapters(layer: LoraLinear) -> bool:
    """Whether the layer computes W x and products of low rank, changed in magnitude or not, and nothing else."""
    return bool(_plain_adapters(layer))


def low_rank(layer: LoraLinear) -> LowRank | None:
    """The adapters without gradients; None if the layer has other ones than plain ones."""
    names = _plain_adapters(layer)
    if not names:
        return None
    with torch.no_grad():
        return _low_rank(layer, names)


def _low_rank(layer: LoraLinear, names: list[str]) -> LowRank:
    scales = [float(layer.scaling[name]) for name in names]
    a, b = ([matrices[name].weight for name in names] for matrices in (layer.lora_A, layer.lora_B))
    if len(names) == 1:
        return LowRank(a=a[0], b=b[0], scale=scales[0], change=change_of_magnitude(layer, names[0]))
    joint = torch.cat([up * scale for up, scale in zip(b, scales, strict=True)], dim=1)
    return LowRank(a=torch.cat(a), b=joint, scale=1.0, change=None)


def _plain_adapters(layer: LoraLinear) -> list[str]:
    """The active adapters if all are unmerged and without active dropout or bias; else an empty list. One adapter may
    be DoRA. Several may not be, nor may one be another variant of LoRA. A base layer whose forward was replaced (by
    layout.py, which prepacks weights, or by offloading) must be called."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or "forward" in vars(layer.base_layer):
        return []
    frozen = not any(parameter.requires_grad for parameter in layer.get_base_layer().parameters())
    return names if frozen and all(_is_plain(layer, name, alone=len(names) == 1) for name in names) else []


def _is_plain(layer: LoraLinear, name: str, *, alone: bool) -> bool:
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
    usual = name not in layer.lora_variant or (alone and type(layer.lora_variant[name]) is DoraLinearVariant)
    return usual and layer.lora_B[name].bias is None and not drops


class _LowRankProducts(torch.autograd.Function):
    """Several layers of one input ``x [..., in]``: their frozen products, and the products with all their factors at
    once. ``trained`` are ``a [rank, in]``, ``b [out, rank]`` and ``change [out]`` (None without DoRA) of each layer;
    they and ``x`` get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Origin | None,
        bases: tuple[nn.Linear, ...],
        scales: tuple[float, ...],
        *trained: Any,
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        factors_a, factors_b = trained[::3], trained[1::3]
        low = torch.cat([a.to(x.dtype) for a in factors_a])
        ups = [(b * scale).to(x.dtype) for b, scale in zip(factors_b, scales, strict=True)]
        changes = [None if change is None else change.to(x.dtype) for change in trained[2::3]]
        with torch.autocast(x.device.type, enabled=False):
            inner = flat @ low.T
            inners = inner.split([up.shape[1] for up in ups], dim=1)
            sums = [
                frozen_product(flat, base).addmm_(own_inner, up.T)
                for base, own_inner, up in zip(bases, inners, ups, strict=True)
            ]
            unscaled = [
                None if change is None else _without_bias(own, base)
                for base, own, change in zip(bases, sums, changes, strict=True)
            ]
            outs = [
                own if scaled is None or change is None else torch.addcmul(own, scaled, change)
                for own, scaled, change in zip(sums, unscaled, changes, strict=True)
            ]
        ctx.save_for_backward(low, inner, *ups, *changes, *unscaled, *to_store(ctx, flat, origin))
        ctx.bases, ctx.scales, ctx.shape = bases, scales, x.shape
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in trained]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        low, inner, *others = ctx.saved_tensors
        count = len(ctx.bases)
        ups, changes, sums = (others[first : first + count] for first in (0, count, 2 * count))
        x = input_again(ctx, others[3 * count :])
        flat = [grad.reshape(-1, grad.shape[-1]).to(x.dtype) for grad in grads]
        of_changes = [
            None if own is None else (grad * own).sum(0, dtype=torch.float32)
            for grad, own in zip(flat, sums, strict=True)
        ]
        flat = [
            grad if change is None else torch.addcmul(grad, grad, change)
            for grad, change in zip(flat, changes, strict=True)
        ]
        ranks = [up.shape[1] for up in ups]
        inwards = [grad @ up for grad, up in zip(flat, ups, strict=True)]
        grad_inner = inwards[0] if len(inwards) == 1 else torch.cat(inwards, dim=1)
        of_a = (grad_inner.T @ x).split(ranks)
        of_b = [
            (grad.T @ own_inner).mul_(scale)
            for grad, own_inner, scale in zip(flat, inner.split(ranks, dim=1), ctx.scales, strict=True)
        ]
        of_trained = itertools.chain(*zip(of_a, of_b, of_changes, strict=True))
        trained = [None if grad is None else grad.to(dtype) for grad, dtype in zip(of_trained, ctx.dtypes, strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_inner @ low
            for grad, base in zip(flat, ctx.bases, strict=True):
                grad_x.addmm_(grad, frozen_weight(base, x.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, *trained


def _without_bias(out: Tensor, base: nn.Linear) -> Tensor:
    """The bias is rounded with the product and not added later: then a change of 0 changes no bit."""
    return out if base.bias is None else out - base.bias.to(out.dtype)
