"""Policy and value as one module, so that a trainer optimises, wraps and saves them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.models.forward.answers import AnswerStream, answer_states, answer_values, statistics_of, unwrapped
from alignment.models.forward.head import TokenStatistics

ValueLoss = Callable[[Tensor], Tensor]
"""From ``[answer tokens]`` values to a scalar."""


class ValueHead(nn.Module):
    """``[tokens]`` values from ``[tokens, width]`` states, in float32; it says 0 until it learned otherwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """The values."""
        with torch.autocast(states.device.type, enabled=False):
            return states.float() @ self.weight


class ActorCritic(nn.Module):
    """``value`` is a model of its own, or a ``ValueHead`` on the policy's trunk: then one pass serves both.

    With ``one_backward`` the passes of two models are made one after the other, and their gradients together.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, value: PreTrainedModel | PeftModel | ValueHead) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.one_backward = False
        # DDP would send the frozen weights around, equal as they are.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen

    def forward(
        self, part: AnswerStream, temperature: float, value_loss: ValueLoss, *, policy_learns: bool = True
    ) -> tuple[TokenStatistics, Tensor]:
        """Statistics of the answer tokens, ``[answer tokens]``, and the scalar ``value_loss`` of their values.

        The loss is there to be backpropagated, not to be read: a model of its own makes its pass when the backward pass
        comes to it, so that the activations of one model are held at a time, and it says 0 until then. Where the policy
        does not learn, a head on its trunk must not teach the trunk either.
        """
        assert torch.is_grad_enabled(), "who learns nothing looks"
        if not isinstance(self.value, ValueHead):
            model = unwrapped(self.value)
            if self.one_backward:
                return self._statistics(part, temperature)[0], value_loss(answer_values(model, part))
            # Made before the policy's graph, because backward passes come last to what was made first.
            deferred = _deferred(lambda: value_loss(answer_values(model, part)), part.labels.device)
            return self._statistics(part, temperature)[0], deferred
        statistics, states = self._statistics(part, temperature)
        return statistics, value_loss(self.value(states if policy_learns else states.detach()))

    def look(self, part: AnswerStream, temperature: float) -> tuple[TokenStatistics, Tensor]:
        """Statistics and values of the answer tokens, both ``[answer tokens]``, to learn nothing from."""
        statistics, states = self._statistics(part, temperature)
        if isinstance(self.value, ValueHead):
            return statistics, self.value(states)
        return statistics, answer_values(unwrapped(self.value), part)

    def _statistics(self, part: AnswerStream, temperature: float) -> tuple[TokenStatistics, Tensor]:
        policy = unwrapped(self.policy)
        states = answer_states(policy, part)
        return statistics_of(policy, states, part, temperature=temperature), states


def _deferred(loss: Callable[[], Tensor], device: torch.device) -> Tensor:
    found: Tensor = _DeferredLoss.apply(torch.zeros((), device=device, requires_grad=True), loss)
    return found


class _DeferredLoss(torch.autograd.Function):
    """A loss whose forward pass is made in the backward pass, under the autocast of the place where it was asked for.

    The first argument is there for autograd alone, which skips a function without an input that wants a gradient.
    """

    @staticmethod
    def forward(ctx: Any, asks: Tensor, loss: Callable[[], Tensor]) -> Tensor:
        device = asks.device.type
        ctx.loss = loss
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return torch.zeros_like(asks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            loss = ctx.loss()
        torch.autograd.backward(loss, grad)
        return None, None
