"""Heads beside the language model's: a reward model's and a critic's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.adapters import put_back
from alignment.models.assembly.load import DTYPES, lineage, load_scalar, load_scalar_head
from alignment.models.assembly.modules import freeze_beside_text
from alignment.models.forward.answers import AnswerStream, answer_states, answer_values, statistics_of, unwrapped
from alignment.models.forward.causal import install_scalar
from alignment.models.forward.head import TokenStatistics
from alignment.models.forward.side_by_side import keep_in_one_stream
from alignment.models.kernels.nf4 import quantize_trunk

HEAD = "head.safetensors"
"""The file of a reward model's scalar head, in its artifact."""
AT_TURN_END = "scored_at_turn_end"
"""The key in an exported reward model's config.json that says: the score is that of the token that ends the turn."""


def load_reward_model(
    spec: StageSpec, stage_input: StageInput, *, device: torch.device, trained: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """The reward model behind a reference; with ``trained``, a value model that starts from it. ``trained`` is the
    dtype of its weights if they are all trained; under an adapter they are frozen. Weights in four bits are quantised
    on ``device``; the caller moves the rest. Its own adapter, the top one, is applied as in training, so that the
    scores are the same. Raises ModelError: the artifact has no scalar head."""
    assert stage_input.path is not None, "the plan refuses 'base' in a reward slot"
    head = stage_input.path / HEAD
    if not head.exists():
        raise ModelError(f"there is no scalar head ({HEAD}) here", where=str(stage_input.path))
    saved = lineage(spec, stage_input)
    full = not saved.adapters
    model = load_scalar(saved.weights, trained if full and trained is not None else DTYPES[spec.model.dtype])
    load_scalar_head(model, head)
    install_scalar(model)
    if full:
        model.requires_grad_(trained is not None)
        freeze_beside_text(model)
        keep_in_one_stream(model)
        return model
    if saved.adapters[-1].nf4:
        quantize_trunk(model, device)
    return put_back(model, [adapter.path for adapter in saved.beside], trainable=trained is not None)


def zero_head(model: PreTrainedModel | PeftModel) -> None:
    """Sets the head and the offset of a reward model to zero, so that all its scores are 0."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.score.modules_to_save["default"] if isinstance(model, PeftModel) else base.score
    with torch.no_grad():
        head.weight.zero_()
        base.score_offset.zero_()


ValueLoss = Callable[[Tensor], Tensor]
"""Computes a scalar loss from values, ``[answer tokens]``."""


class ValueHead(nn.Module):
    """``[tokens]`` values from ``[tokens, width]`` states, in float32; its weights start at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return states.float() @ self.weight


class ActorCritic(nn.Module):
    """Policy and value. ``value`` is a separate model, or a ``ValueHead`` on the policy's trunk; then one pass serves
    both. With None there is no critic. With ``joint_backward`` both forward passes come before a joint backward
    pass."""

    def __init__(
        self, policy: PreTrainedModel | PeftModel, value: PreTrainedModel | PeftModel | ValueHead | None
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.joint_backward = False
        # DDP would broadcast the frozen weights, although they are equal everywhere.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen

    def forward(
        self,
        micro_batch: AnswerStream,
        temperature: float,
        value_loss: ValueLoss,
        *,
        policy_learns: bool = True,
        entropy_gradient: bool = False,
    ) -> tuple[TokenStatistics, Tensor]:
        """Statistics of the answer tokens, ``[answer tokens]``, and the scalar ``value_loss`` of their values. Without
        a critic that loss is 0. The loss is only for the backward pass; its value is 0. A separate value model runs its
        forward pass during the backward pass, so that only one model's activations are in memory at a time. If the
        policy does not learn, a head on its trunk must not train the trunk either."""
        assert torch.is_grad_enabled(), "without gradients, call look"
        if self.value is None or isinstance(self.value, ValueHead):
            statistics, states = self._statistics(micro_batch, temperature, entropy_gradient)
            if self.value is None:
                return statistics, torch.zeros((), device=micro_batch.labels.device)
            return statistics, value_loss(self.value(states if policy_learns else states.detach()))
        model = unwrapped(self.value)
        if self.joint_backward:
            statistics, _ = self._statistics(micro_batch, temperature, entropy_gradient)
            return statistics, value_loss(answer_values(model, micro_batch))
        # It comes before the policy's graph, because the backward pass visits the earliest node last.
        start = torch.zeros((), device=micro_batch.labels.device, requires_grad=True)
        deferred = _DeferredLoss.apply(start, lambda: value_loss(answer_values(model, micro_batch)))
        return self._statistics(micro_batch, temperature, entropy_gradient)[0], deferred

    def look(self, micro_batch: AnswerStream, temperature: float) -> tuple[TokenStatistics, Tensor | None]:
        """Statistics and values of the answer tokens, both ``[answer tokens]``, without gradients. Without a critic the
        values are None."""
        statistics, states = self._statistics(micro_batch, temperature)
        if self.value is None:
            return statistics, None
        if isinstance(self.value, ValueHead):
            return statistics, self.value(states)
        return statistics, answer_values(unwrapped(self.value), micro_batch)

    def _statistics(
        self, micro_batch: AnswerStream, temperature: float, entropy_gradient: bool = False
    ) -> tuple[TokenStatistics, Tensor]:
        policy = unwrapped(self.policy)
        states = answer_states(policy, micro_batch)
        statistics = statistics_of(
            policy, states, micro_batch, temperature=temperature, entropy_gradient=entropy_gradient
        )
        return statistics, states


class _DeferredLoss(torch.autograd.Function):
    """A loss whose forward pass runs in the backward pass, under the autocast that was active when it was created. The
    first argument is only for autograd, which skips a function without an input that needs a gradient."""

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
