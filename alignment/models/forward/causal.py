"""The fast forward behind the calls that TRL's trainers make. SFT and DPO call ``model(..., labels=...,
fused_lm_head=True)`` and read per-token statistics; the reward trainer calls ``model(input_ids,
attention_mask).logits``. Here one flat trunk pass serves both, with the head on labelled positions only."""

from __future__ import annotations

import functools
import logging
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from trl.trainer.utils import FusedCausalLMOutput

from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.head import label_statistics, scalar_at, scales_logits
from alignment.models.forward.rows import FlatRows, flatten, on_host, sent, stream

log = logging.getLogger(__name__)
IGNORED = -100


def install_causal(model: PreTrainedModel) -> None:
    """Serves ``fused_lm_head=True`` calls of a causal language model with the fast forward; other calls are unchanged.
    Call it after TRL's trainer has installed its own fused head. A model whose head scales its logits or has a bias
    keeps TRL's."""
    if scales_logits(model):
        log.warning(
            "%s scales its logits or adds a bias to them, so TRL's own forward pass is used, which also computes "
            "padding.",
            type(model).__name__,
        )
        return
    use_flat_attention(model)
    otherwise = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return otherwise(*args, **kwargs)
        return _causal_output(self, _rows_of(kwargs), kwargs["labels"])

    model.forward = types.MethodType(forward, model)


def install_scalar(model: PreTrainedModel) -> None:
    """Serves a sequence-classification model with one label: the float32 score at each row's last real token."""
    use_flat_attention(model)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        rows = flatten(input_ids, attention_mask)
        return SequenceClassifierOutput(logits=scalar_at(self, rows, rows.ends)[:, None])

    model.forward = types.MethodType(forward, model)


def _rows_of(kwargs: dict[str, Any]) -> FlatRows:
    """The stream of a batch that is padded (attention mask) or packed (position ids that restart)."""
    input_ids, mask, positions = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None or positions is None:
        return flatten(input_ids, torch.ones_like(input_ids) if mask is None else mask)
    ids, columns = on_host(input_ids, positions)
    starts = (columns.flatten() == 0).nonzero().flatten().tolist()
    tokens = ids.flatten().tolist()
    bounds = zip(starts, [*starts[1:], len(tokens)], strict=True)
    return stream([tokens[start:end] for start, end in bounds], input_ids.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Learned:
    """What is learned from a batch whose labels are ``[rows, columns]``, or packed as ``[1, tokens]``. ``before`` are
    the indices in the stream of the states that predict ``labels``, and ``at`` where these stand in ``mask``,
    flattened: ``[rows, columns - 1]`` or ``[1, tokens - 1]``, True where a token is learned."""

    before: Tensor
    labels: Tensor
    at: Tensor
    mask: Tensor


def _causal_output(model: PreTrainedModel, rows: FlatRows, labels: Tensor) -> FusedCausalLMOutput:
    """TRL's trainers make their losses of the log-probabilities; ``loss`` is the mean over the batch's labels."""
    learned = _learned_of(labels, rows)
    states = trunk_states(model.base_model, rows)
    statistics = label_statistics(model, states[learned.before], learned.labels)

    def spread(values: Tensor) -> Tensor:
        # By indices, because the gradient by a mask would wait for the device.
        return values.new_zeros(learned.mask.numel()).index_put((learned.at,), values).view(learned.mask.shape)

    return FusedCausalLMOutput(
        loss=-statistics.logprobs.sum() / learned.mask.sum().clamp(min=1),
        log_probs=spread(statistics.logprobs),
        entropy=spread(statistics.entropy),
        mean_logits=spread(statistics.mean_logits),
        is_top1=spread(statistics.is_top1),
        label_mask=learned.mask,
    )


def _learned_of(labels: Tensor, rows: FlatRows) -> _Learned:
    """Found on the host; the state at column c predicts column c + 1. Raises ValueError: padding has a label."""
    given, is_real, index = on_host(labels, rows.is_real, rows.index)
    wanted = given
    if given.shape != is_real.shape:
        wanted = given.new_full(is_real.shape, IGNORED).masked_scatter(is_real, given.flatten())
    has_label = wanted != IGNORED
    if bool((has_label & ~is_real).any()):
        raise ValueError("padding has a label")
    mask = has_label[:, 1:] & is_real[:, :-1]
    tensors = {"before": index[:, :-1][mask], "labels": wanted[:, 1:][mask]}
    if wanted is not given:
        mask = _packed(is_real, mask, given)
    tensors |= {"at": mask.flatten().nonzero().flatten(), "mask": mask}
    return _Learned(**sent(tensors, labels.device))


def _packed(is_real: Tensor, label_mask: Tensor, labels: Tensor) -> Tensor:
    first = torch.zeros_like(is_real[:, :1])  # a row's first token is never predicted
    return torch.cat([first, label_mask], dim=-1)[is_real].view_as(labels)[:, 1:]
