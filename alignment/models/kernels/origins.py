"""Activations that are computed again in the backward pass, because that costs less than storing them.

A norm's result and a gated product take one or two passes over numbers that autograd stores anyway (selective
recomputation, Korthikanti et al. 2022, section 5). Such a tensor carries its origin. A function that needs it in the
backward pass stores what the origin reads instead, and computes the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NAME = "alignment_origin"


@dataclass(frozen=True, slots=True)
class Origin:
    """``compute(*inputs)`` is the tensor that carries it, as long as nobody changes that in place, which would raise
    PyTorch's count of its versions."""

    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def with_origin(tensor: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The same tensor, which carries its origin from now on if gradients flow through it.

    Autograd then stores ``inputs`` anyway, for the function that computed the tensor, and refuses changes to them.
    """
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
