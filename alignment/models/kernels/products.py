"""A linear layer with low-rank adapters as one function: y = x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3).

PEFT's layer takes nine passes over activations, several of which autograd stores. Here the scale is multiplied into the
small factor, the sum is part of the matrix product, and only ``x`` and ``x Aᵀ`` are stored. Several adapters on one
layer become one adapter with the sum of their ranks. Layers that read the same input (queries, keys and values; gate
and up) share the products with small factors, whose few columns would leave a processor idle.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from alignment.models.kernels.nf4 import Nf4Linear, computes_in, frozen_weight


def fuse_adapters(model: PeftModel) -> None:
    """Replaces the forward of every plain LoRA layer by one function; other layers stay as they are."""
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
    """The outputs of several layers for one input, by one function if all of them have plain low-rank adapters."""
    joint: Products | None = vars(layers[0]).get(JOINT)
    if joint is not None:
        return joint(x)
    if all(_is_fused(layer) and not is_hooked(layer) and _plain_adapters(layer) for layer in layers):
        return _together(x, layers)
    return tuple(layer(x) for layer in layers)


def is_hooked(layer: nn.Module) -> bool:
    """Whether the layer has hooks, as PEFT registers them for rows with different adapters."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)


def _is_fused(layer: nn.Module) -> bool:
    return type(layer) is LoraLinear and getattr(vars(layer).get("forward"), "__func__", None) is _forward


def _together(x: Tensor, layers: tuple[Any, ...]) -> tuple[Tensor, ...]:
    factors_and_scales = [_factors(layer, _plain_adapters(layer)) for layer in layers]
    bases = tuple(layer.base_layer for layer in layers)
    scales = tuple(scale for _, _, scale in factors_and_scales)
    factors = itertools.chain(*((a, b) for a, b, _ in factors_and_scales))
    return _LowRankProducts.apply(x.to(computes_in(bases[0])), bases, scales, *factors)


def factors(layer: LoraLinear) -> tuple[Tensor, Tensor] | None:
    """The adapters' ``a [rank, in]`` and ``s·b [out, rank]``; None if the layer computes more than W x + s·b a x."""
    names = _plain_adapters(layer)
    if not names:
        return None
    a, b, scale = _factors(layer, names)
    return a.detach(), b.detach() * scale


def _factors(layer: LoraLinear, names: list[str]) -> tuple[Tensor, Tensor, float]:
    """``a``, ``b`` and the scale of their product."""
    scales = [float(layer.scaling[name]) for name in names]
    a, b = ([matrices[name].weight for name in names] for matrices in (layer.lora_A, layer.lora_B))
    if len(names) == 1:
        return a[0], b[0], scales[0]
    return torch.cat(a), torch.cat([up * scale for up, scale in zip(b, scales, strict=True)], dim=1), 1.0


def _plain_adapters(layer: LoraLinear) -> list[str]:
    """The active adapters if all are unmerged and without active dropout, bias or variant; else an empty list.

    A base layer whose forward was replaced (by layout.py, which prepacks weights, or by offloading) must be called.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or "forward" in vars(layer.base_layer):
        return []
    frozen = not any(parameter.requires_grad for parameter in layer.get_base_layer().parameters())
    return names if frozen and all(_is_plain(layer, name) for name in names) else []


def _is_plain(layer: LoraLinear, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
    return name not in layer.lora_variant and layer.lora_B[name].bias is None and not drops


class _LowRankProducts(torch.autograd.Function):
    """Several layers of one input ``x [..., in]``: their frozen products, and the products with all their factors at
    once.

    ``factors`` are ``a [rank, in]`` and ``b [out, rank]`` of each layer; they and ``x`` get gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: tuple[nn.Linear, ...], scales: tuple[float, ...], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        low = torch.cat([a.to(x.dtype) for a in factors[::2]])
        ups = [(b * scale).to(x.dtype) for b, scale in zip(factors[1::2], scales, strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            inner = flat @ low.T
            inners = inner.split([up.shape[1] for up in ups], dim=1)
            outs = [
                _product(flat, base).addmm_(own_inner, up.T)
                for base, own_inner, up in zip(bases, inners, ups, strict=True)
            ]
        ctx.save_for_backward(flat, low, inner, *ups)
        ctx.bases, ctx.scales, ctx.shape = bases, scales, x.shape
        ctx.dtypes = [factor.dtype for factor in factors]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low, inner, *ups = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]).to(x.dtype) for grad in grads]
        ranks = [up.shape[1] for up in ups]
        inwards = [grad @ up for grad, up in zip(flat, ups, strict=True)]
        grad_inner = inwards[0] if len(inwards) == 1 else torch.cat(inwards, dim=1)
        grads_a = (grad_inner.T @ x).split(ranks)
        grads_b = [grad.T @ own_inner for grad, own_inner in zip(flat, inner.split(ranks, dim=1), strict=True)]
        grads_of_factors = [(a, b.mul_(scale)) for a, b, scale in zip(grads_a, grads_b, ctx.scales, strict=True)]
        factors = [grad.to(dtype) for grad, dtype in zip(itertools.chain(*grads_of_factors), ctx.dtypes, strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_inner @ low
            for grad, base in zip(flat, ctx.bases, strict=True):
                grad_x.addmm_(grad, frozen_weight(base, x.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *factors


def _product(x: Tensor, base: nn.Linear) -> Tensor:
    weight = frozen_weight(base, x.dtype)
    return x @ weight.T if base.bias is None else torch.addmm(base.bias.to(x.dtype), x, weight.T)
