"""A stream's states in two parts side by side (two_threads.py): with two cores a pass takes less time.

The results do not depend on which thread is faster: the sum of each part's gradients is complete before they are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from alignment.models.assembly.precision import products_dtype
from alignment.models.forward.divided_rows import DividedRows, divided
from alignment.models.forward.rows import FlatRows
from alignment.models.forward.two_threads import has_two_threads, in_two_threads
from alignment.models.kernels.nf4 import Nf4Linear

WORTH_DIVIDING = 2**30
"""Tokens times weights per layer from which two parts are faster; below it Python takes most of the time
(SmolLM2-135M, docs/LOG.md, 2026-11-29)."""

FEW = 0.2
"""The share of weights up to which trained ones are few. Each part has gradients of all of them, before they are
added."""

_WHOLE = "alignment_in_one_stream"
"""The attribute of a trunk whose rows are never divided."""

_RANDOM = ("dropout", "layerdrop", "jitter_noise")
"""Endings of the names of rates with which modules of transformers draw random numbers in training."""

_ALONE = (Nf4Linear, ParamWrapper)
"""Modules of which only one thread may run a pass, or gains by it."""

States = Callable[[FlatRows], Tensor]
"""Computes ``[tokens, width]`` states of a stream."""


def keep_in_one_stream(model: PreTrainedModel) -> None:
    """Divides rows neither here nor in copies, if more than a few weights are trained.

    Passes with gradients would not be divided then, and in bfloat16, passes without gradients that are would give other
    log-probabilities than those that they are compared with.
    """
    parameters = list(model.base_model.parameters())
    if sum(each.numel() for each in parameters if each.requires_grad) > FEW * sum(each.numel() for each in parameters):
        setattr(model.base_model, _WHOLE, True)


def side_by_side(trunk: PreTrainedModel, states_of: States, rows: FlatRows) -> Tensor | None:
    """``states_of(rows)``, computed in two parts; None if the rows had better be computed at once.

    That is: for models that ``can_divide`` refuses, with little to compute, if more than a few weights are trained, or
    with rows that cannot be divided into two parts of about equal work.
    """
    if not can_divide(trunk) or not _is_worth_it(trunk, len(rows.input_ids)) or (division := divided(rows)) is None:
        return None
    trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not trained:
        states = in_two_threads(states_of, division.parts)
        return torch.cat(states).index_select(0, division.source)
    joined: Tensor = _SideBySide.apply(states_of, division, *trained)
    return joined


def can_divide(trunk: PreTrainedModel) -> bool:
    """Whether two threads may run passes of the model at once, and gain by it.

    They may not if modules draw random numbers, whose order would depend on the threads; if frequencies of positions
    are chosen anew by each pass (LongRoPE, Ding et al. 2024); or if weights are made for a call and dropped afterwards,
    by hooks or by PEFT's adapters on experts. They gain nothing if each would convert all weights for itself.
    """
    weight: Tensor = trunk.get_input_embeddings().weight
    if not has_two_threads(weight) or products_dtype(weight) is not weight.dtype or hasattr(trunk, _WHOLE):
        return False
    return not any(
        module._forward_pre_hooks or isinstance(module, _ALONE) or _draws(module) or _chooses_frequencies(module)
        for module in trunk.modules()
    )


def _draws(module: nn.Module) -> bool:
    if not module.training:
        return False
    is_dropout = isinstance(module, nn.Dropout) and module.p > 0
    return is_dropout or any(
        name.endswith(_RANDOM) and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items()
    )


def _chooses_frequencies(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    return "longrope" in (types.values() if isinstance(types, dict) else (types,))


def _is_worth_it(trunk: PreTrainedModel, tokens: int) -> bool:
    weights = trained = 0
    for parameter in trunk.parameters():
        weights += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    layers: int = trunk.config.get_text_config().num_hidden_layers
    has_few = not torch.is_grad_enabled() or trained <= FEW * weights
    return has_few and tokens * weights >= WORTH_DIVIDING * layers


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
            if not states.requires_grad:  # what is trained has no part in them, such as adapters that are switched off
                return (None,) * len(ctx.trained)
            return torch.autograd.grad(states, ctx.trained, own_grad, allow_unused=True)

        first, second = (list(of_part) for of_part in in_two_threads(gradients, inputs))
        for index, gradient in enumerate(second):
            first[index], second[index] = _sum(first[index], gradient), None
        return None, None, *first


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
