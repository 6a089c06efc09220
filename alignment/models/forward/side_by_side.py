"""A stream's states in two parts side by side (two_threads.py): with two cores a pass takes less time.

The results do not depend on which thread is faster: gradients are added in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from alignment.models.forward.divided_rows import DividedRows, divided
from alignment.models.forward.rows import FlatRows
from alignment.models.forward.two_threads import has_two_threads, in_two_threads

WORTH_DIVIDING = 2**30
"""Tokens times weights of a layer from which two parts are faster; below it Python takes most of the time."""

FEW = 0.2
"""The share of weights up to which trained ones are few. Each part has gradients of all of them."""

States = Callable[[FlatRows], Tensor]
"""Computes ``[tokens, width]`` states of a stream."""


def side_by_side(trunk: PreTrainedModel, states_of: States, rows: FlatRows) -> Tensor | None:
    """``states_of(rows)``, computed in two parts; None if the rows had better be computed at once.

    That is: on another device than the CPU, with another number of threads than two, with little to compute, with most
    weights trained, with weights that are sharded or dropout, whose random numbers depend on the order, or with rows
    that cannot be divided into two parts of about equal work.
    """
    if not _can_divide(trunk, rows) or (division := divided(rows)) is None:
        return None
    trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not trained:
        states = in_two_threads(states_of, division.parts)
        return torch.cat(states).index_select(0, division.source)
    joined: Tensor = _SideBySide.apply(states_of, division, *trained)
    return joined


def _can_divide(trunk: PreTrainedModel, rows: FlatRows) -> bool:
    if not has_two_threads(rows.input_ids):
        return False
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return False
    if any(isinstance(module, nn.Dropout) and module.p and module.training for module in trunk.modules()):
        return False
    weights = trained = 0
    for parameter in trunk.parameters():
        weights += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    layers: int = trunk.config.get_text_config().num_hidden_layers
    is_much = len(rows.input_ids) * weights >= WORTH_DIVIDING * layers
    return is_much and (not torch.is_grad_enabled() or trained <= FEW * weights)


class _SideBySide(torch.autograd.Function):
    """States of all rows. The parts' own graphs are kept, and end in the trained weights, which get the sums of their
    gradients."""

    @staticmethod
    def forward(ctx: Any, states_of: States, division: DividedRows, *trained: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.states = in_two_threads(states_of, division.parts)
        ctx.source, ctx.trained = division.source, trained
        return torch.cat([states.detach() for states in ctx.states]).index_select(0, division.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths = [len(states) for states in ctx.states]
        grads = grad.new_zeros(sum(lengths), grad.shape[1]).index_copy_(0, ctx.source, grad).split(lengths)
        inputs = list(zip(ctx.states, grads, strict=True))
        ctx.states = None

        def gradients(inputs_of_part: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            states, own_grad = inputs_of_part
            return torch.autograd.grad(states, ctx.trained, own_grad, allow_unused=True)

        first, second = in_two_threads(gradients, inputs)
        return None, None, *(_sum(*both) for both in zip(first, second, strict=True))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
