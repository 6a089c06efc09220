"""Linear layers of one input whose weights are trained whole: y = x Wᵀ + b.

Under autocast, autograd would store a copy of the input for each layer, and of each weight. Here the input is stored
once for all layers. If it has an origin (origins.py), only what that reads is stored. Weights are cast again in the
backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.models.assembly.precision import products_dtype
from alignment.models.kernels.origins import Origin, input_again, origin_of, to_store


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
    None.

    Gradients are summed as autograd does it: in the input's dtype, those of the last layer first.
    """

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
