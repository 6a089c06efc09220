"""Linear layers of one input whose weights are trained whole: y = x Wᵀ + b.

Autograd would store the input once for each layer, under autocast as copies. Here it is stored once for all of them; of
an input that has an origin (origins.py) only what that reads.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from alignment.models.assembly.precision import products_dtype
from alignment.models.kernels.origins import Origin, input_again, origin_of, to_store


def are_whole(layers: tuple[nn.Module, ...]) -> bool:
    """Whether the layers are plain ones with weights that are trained now."""
    return torch.is_grad_enabled() and all(
        type(layer) is nn.Linear and layer.weight.requires_grad and "forward" not in vars(layer) for layer in layers
    )


def whole_products(x: Tensor, layers: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of the layers for ``x [..., in]``, each ``[..., out]``."""
    dtype = products_dtype(x)
    trained = itertools.chain(*((layer.weight, layer.bias) for layer in layers))
    cast = (None if tensor is None else tensor.to(dtype) for tensor in trained)
    outputs: tuple[Tensor, ...] = _WholeProducts.apply(x, dtype, origin_of(x), *cast)
    return outputs


class _WholeProducts(torch.autograd.Function):
    """``weights_biases`` are the weight ``[out, in]`` and the bias ``[out]`` or None of each layer, in ``dtype``.

    Gradients are summed as autograd does it: in the input's dtype, those of the last layer first.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, origin: Origin | None, *weights_biases: Any
    ) -> tuple[Tensor, ...]:
        weights, biases = weights_biases[::2], weights_biases[1::2]
        read = x.to(dtype)
        ctx.save_for_backward(*weights, *to_store(ctx, read, origin))
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return tuple(nn.functional.linear(read, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        weights, x = stored[: len(grads)], input_again(ctx, stored[len(grads) :])
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        of_layers: list[Tensor | None] = []
        for number, grad in enumerate(flat):
            needs_weight, needs_bias = ctx.needs_input_grad[3 + 2 * number : 5 + 2 * number]
            of_layers += [grad.T @ x if needs_weight else None, grad.sum(0) if needs_bias else None]
        if not ctx.needs_input_grad[0]:
            return None, None, None, *of_layers
        of_x = (
            (grad @ weight).to(ctx.input_dtype) for grad, weight in zip(reversed(flat), reversed(weights), strict=True)
        )
        return functools.reduce(torch.add, of_x).view(ctx.shape), None, None, *of_layers
