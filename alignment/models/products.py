"""A low-rank adapter beside its linear layer as one function: y = x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3).

PEFT's layer does the same in nine passes over activations, of which autograd keeps several. Here the scale goes into
the small factor, the sum into the matrix product, and only ``x`` and ``x Aᵀ`` are kept.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from alignment.models.precision import products_dtype


def fuse_adapters(model: PeftModel) -> None:
    """Lets every plain LoRA layer of the model compute in one function; layers of other kinds stay as they are."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.forward = types.MethodType(_forward, module)


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = _only_adapter(self)
    if args or kwargs or name is None:
        return LoraLinear.forward(self, x, *args, **kwargs)
    base = self.base_layer
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return _LowRankProduct.apply(
        x.to(products_dtype(base.weight)), base.weight, base.bias, a, b, float(self.scaling[name])
    )


def factors(layer: LoraLinear) -> tuple[Tensor, Tensor] | None:
    """The adapter's ``a [rank, in]`` and ``s·b [out, rank]``; None where the layer computes more than W x + s·b a x."""
    name = _only_adapter(layer)
    if name is None:
        return None
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * float(layer.scaling[name])


def _only_adapter(layer: LoraLinear) -> str | None:
    """The adapter to add where it is one, unmerged, without dropout at work, bias or variant; else None.

    Layers whose forward somebody replaced (decoding lays weights out anew, offloading fetches them) want to be called.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or "forward" in vars(layer.base_layer):
        return None
    name = names[0]
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
    plain = name not in layer.lora_variant and layer.lora_B[name].bias is None
    return name if plain and not drops and not layer.get_base_layer().weight.requires_grad else None


class _LowRankProduct(torch.autograd.Function):
    """Gradients for ``x [..., in]`` and the factors ``a [rank, in]``, ``b [out, rank]``; weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, low, up = weight.to(x.dtype), a.to(x.dtype), (b * scale).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            inner = flat @ low.T
            out = flat @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), flat, weight.T)
            out.addmm_(inner, up.T)
        ctx.save_for_backward(flat, weight, low, up, inner)
        ctx.scale = scale
        ctx.shape, ctx.factor_dtype = x.shape, a.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, up, inner = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_inner = grad @ up
        grad_a = (grad_inner.T @ x).to(ctx.factor_dtype)
        grad_b = (grad.T @ inner).to(ctx.factor_dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, low).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None
