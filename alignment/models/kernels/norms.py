"""Root-mean-square layer norm (Zhang and Sennrich 2019) as one function, equal to the models' own layers. The models'
code takes eight passes, half of them over float32 copies that autograd stores: on CPU a fifth of a step. Here autograd
stores the input and one number per token, and the result carries its origin (products.py). A layer is replaced only
after a test on fixed numbers shows that it computes one of the two forms in use: weight · x/rms, or (1 + weight) ·
x/rms."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignment.costs.shadows import real_tensors
from alignment.models.kernels.products import with_origin

_MANY = 1 << 16
"""Count of numbers from which a pass over them takes longer than the call itself."""


def fuse_norms(model: nn.Module) -> int:
    """Replaces the forward of every root-mean-square norm whose form is known; returns how many."""
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (shift := _shift_of(module)) is not None:
            module.forward = types.MethodType(_forward_of(_eps(module), shift), module)
            count += 1
    return count


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


def _shift_of(module: nn.Module) -> float | None:
    """The number that the layer adds to its weight, 0 or 1; None if its form is another or it was replaced already."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.is_meta or not weight.numel():
        return None
    if "forward" in vars(module) or _eps(module) == 0.0:
        return None
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), real_tensors():
        own: Any = copy.copy(module)
        own._parameters = {}
        # As loaded, weights may all be 0 or 1.
        own.weight = nn.Parameter(torch.linspace(0.3, 1.7, weight.numel(), device=weight.device))
        probe = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device).view(2, -1)
        expected = own(probe)
        for shift in (0.0, 1.0):
            if torch.allclose(_normed(probe, own.weight, _rate(probe, _eps(module)), shift), expected, atol=1e-6):
                return shift
    return None


def _forward_of(eps: float, shift: float) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # in a decoding step autograd would take as long as the norm
            if shift == 0.0 and hidden_states.is_cuda and hidden_states.shape[1:-1] == (1,):
                # Such a step launches two kernels here in place of seven. Other passes are rounded as in training.
                unweighted, _ = torch.ops.aten._fused_rms_norm(hidden_states, hidden_states.shape[-1:], None, eps)
                weighted: Tensor = unweighted * self.weight
                return weighted
            return _normed(hidden_states, self.weight, _rate(hidden_states, eps), shift)
        rate = _rate(hidden_states.detach(), eps)
        normed = _RmsNorm.apply(hidden_states, self.weight, rate, shift)
        return with_origin(normed, functools.partial(_normed, shift=shift), hidden_states, self.weight, rate)

    return forward


def _rate(x: Tensor, eps: float) -> Tensor:
    """``[..., 1]``: 1/rms of ``x [..., width]``, in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, rate: Tensor, shift: float) -> Tensor:
    if shift:  # (1 + weight) · x/rms in float32, rounded once
        return (torch.mul(x, rate) * (weight.float() + shift)).to(x.dtype)
    return _scaled(x, rate) * weight  # x/rms is rounded before the weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rate: Tensor, shift: float) -> Tensor:
        ctx.save_for_backward(x, weight, rate)
        ctx.shift = shift
        return _normed(x, weight, rate, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * torch.mul(x, rate)).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        scale = weight + ctx.shift if ctx.shift else weight
        weighted = (grad * scale).to(x.dtype)
        along = (weighted * x).sum(-1, keepdim=True, dtype=torch.float32)
        slope = (rate.pow(3) * along).div_(-x.shape[-1])
        return _scaled(weighted, rate).add_(_scaled(x, slope)), grad_weight, None, None


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x [..., width]`` times a float32 ``factor [..., 1]``, rounded once. On CPU a product of two dtypes first copies
    both. For many numbers it takes twice as long as batch normalisation with given statistics, in which tokens are the
    channels, of mean 0 and variance 1."""
    if x.device.type != "cpu" or x.dtype == factor.dtype or x.numel() < _MANY:
        return torch.mul(x, factor, out=torch.empty_like(x))
    channels = factor.reshape(-1)
    mean, variance = torch.zeros_like(channels), torch.ones_like(channels)
    flat = x.reshape(1, len(channels), -1)
    scaled, *_ = torch.native_batch_norm(flat, channels, None, mean, variance, False, 0.0, 0.0)
    return scaled.view(x.shape)
