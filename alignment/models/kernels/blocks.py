"""Attention and feed-forward blocks of Llama-like models in fewer passes over their activations, with equal results.
The differences: layers of one input are multiplied together (products.py). A gated product is computed again in the
backward pass instead of stored (products.py). Rotary positions (Su et al. 2021) take one pass over all numbers and two
over half of them, forward and backward, instead of a dozen over all. A block is replaced only after a test on fixed
numbers shows that it computes the expected function."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignment.costs.shadows import Shadow, real_tensors
from alignment.models.kernels.nf4 import float32_copy
from alignment.models.kernels.products import products, with_origin

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


_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "GemmaAttention"}
_FEED_FORWARD = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "GemmaMLP", "Qwen3MLP"}


def fuse_blocks(model: nn.Module) -> int:
    """Replaces the forward of every block whose function is known; returns how many."""
    understood: dict[type, Any] = {}
    count = 0
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module) or kind.__name__ not in _ATTENTION | _FEED_FORWARD:
            continue
        if kind not in understood:
            understood[kind] = _replacement(module)
        if understood[kind] is not None:
            module.forward = types.MethodType(understood[kind], module)
            count += 1
    return count


def read_together(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a block that read one input and are multiplied together; empty if the module was not replaced."""
    forward = getattr(vars(module).get("forward"), "__func__", None)
    names: tuple[str, ...] = ()
    if forward is _attention:
        names = "q_proj", "k_proj", "v_proj"
    elif forward is _feed_forward:
        names = "gate_proj", "up_proj"
    return tuple(getattr(module, name) for name in names)


def _replacement(module: nn.Module) -> Any:
    parameters = list(module.parameters())
    if any(parameter.is_meta or not parameter.numel() for parameter in parameters):
        return None
    if isinstance(parameters[0], Shadow):  # there are no numbers to test it on
        return _feed_forward if type(module).__name__ in _FEED_FORWARD else _attention
    device = parameters[0].device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        own = float32_copy(module).eval()
        if type(module).__name__ in _FEED_FORWARD:
            probe = torch.linspace(-2, 2, 3 * own.gate_proj.in_features, device=device).view(1, 3, -1)
            return _feed_forward if torch.allclose(_feed_forward(own, probe), own(probe), atol=1e-5) else None
        probe = torch.linspace(-2, 2, 3 * own.q_proj.in_features, device=device).view(1, 3, -1)
        turn = torch.linspace(0, 3, 3 * own.head_dim, device=device).view(1, 3, -1)
        turns = turn.cos(), turn.sin()
        expected, _ = own(probe, position_embeddings=turns, attention_mask=None)
        return _attention if torch.allclose(_attention(own, probe, turns)[0], expected, atol=1e-5) else None


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Like ``LlamaAttention.forward``. Eager attention is left to the model, because each has its own function."""
    if self.config._attn_implementation == "eager":
        arguments = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "cache": cache,
            **kwargs,
        }
        return type(self).forward(self, hidden_states, **arguments)
    shape = hidden_states.shape[:-1]
    query, key, value = (
        states.view(*shape, -1, self.head_dim).transpose(1, 2)
        for states in products(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
    )
    cos, sin = (turn.unsqueeze(1) for turn in position_embeddings)
    query, key = _rotated(query, key, cos, sin)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    holder = self.config if type(self).__name__ == "MistralAttention" else self  # as Mistral's and Qwen2's own forward
    if (window := getattr(holder, "sliding_window", None)) is not None:
        kwargs["sliding_window"] = window
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    attended, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **kwargs,
    )
    return self.o_proj(attended.reshape(*shape, -1).contiguous()), weights


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = products(x, (self.gate_proj, self.up_proj))
    if not torch.is_grad_enabled() or next(self.act_fn.parameters(), None) is not None:
        out: Tensor = self.down_proj(self.act_fn(gate) * up)
        return out
    gated = _Gated.apply(gate, up, self.act_fn)
    gated = with_origin(gated, functools.partial(_gated, act=self.act_fn), gate, up)
    return products(gated, (self.down_proj,))[0]


def _gated(gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
    return _opened(gate, act) * up


def _opened(gate: Tensor, act: nn.Module) -> Tensor:
    """``act(gate)`` in the gate's dtype, also where autocast would choose another: in the backward pass it is off."""
    with torch.autocast(gate.device.type, enabled=False):
        opened: Tensor = act(gate)
    return opened


class _Gated(torch.autograd.Function):
    """``act(gate) · up`` (Shazeer 2020) of two ``[..., width]``; nothing else is stored."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _gated(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            opened = _opened(gate, ctx.act)
        (grad_gate,) = torch.autograd.grad(opened, gate, grad * up)
        return grad_gate, grad * opened.detach(), None


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() or query.shape[2] > 1:
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    # A decoding step spends more time on calls than on arithmetic, so both are rotated in one call.
    heads = [query.shape[1], key.shape[1]]
    return _turned(torch.cat([query, key], dim=1), cos, sin.chunk(2, dim=-1), 1).split(heads, dim=1)


class _Rotary(torch.autograd.Function):
    """Rotates ``x [..., tokens, width]``: its halves (x₁, x₂) become (x₁ cos − x₂ sin, x₂ cos + x₁ sin)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin.chunk(2, dim=-1), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin.chunk(2, dim=-1)[::-1], -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: tuple[Tensor, ...], sign: int) -> Tensor:
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
    (first, second), (left, right) = (states.chunk(2, dim=-1) for states in (x, torch.mul(x, cos, out=out)))
    left.addcmul_(second, sin[0], value=-sign)
    right.addcmul_(first, sin[1], value=sign)
    return out
