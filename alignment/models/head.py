"""Log-probabilities from hidden states without ever holding all logits.

The head is projected in chunks, matrix products in the weights' dtype, log-sum-exp and probabilities in float32. The
backward pass recomputes a chunk's logits and uses the exact gradient of log softmax, so memory stays at one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.flat import FlatRows, trunk_states

CHUNK = 512
"""Tokens projected at once: 512 × 49,152 float32 logits are 100 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """What the next-token distribution says about each labelled position; one dimension, in the order of the labels.

    ``logprobs`` carries gradients (nats); ``entropy`` (nats), ``mean_logits`` and ``is_top1`` do not.
    """

    logprobs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def token_statistics(hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0) -> TokenStatistics:
    """Scores ``labels`` under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: ``[tokens, width]`` hidden states, each of the position *before* its label.
        weight: ``[vocabulary, width]`` the head; it gets a gradient if it wants one.
        labels: ``[tokens]`` token ids.
    """
    logprobs, entropy, mean_logits, is_top1 = _ChunkedLogSoftmax.apply(hidden, weight, labels, temperature)
    return TokenStatistics(logprobs=logprobs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1)


def transforms_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits are more than ``hidden @ weight.T``: scaled, capped, or with a bias added."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return True
    config = model.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return any(getattr(config, name, None) is not None for name in names)


def scalar_at(model: PreTrainedModel, rows: FlatRows, places: Tensor) -> Tensor:
    """``[places]`` scores of a model with one scalar head less its offset, at places of the stream, in float32."""
    states = trunk_states(model.base_model, rows)[places]
    with torch.autocast(states.device.type, enabled=False):
        return model.score(states.float()).squeeze(-1) - model.score_offset


class _ChunkedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
        count = hidden.shape[0]
        compute, dtypes = _compute_dtype(hidden, weight), (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        columns = [torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(4)]
        logprobs, entropy, mean_logits, log_norm = columns
        is_top1 = torch.empty(count, dtype=torch.bool, device=hidden.device)
        for rows in _chunks(count):
            logits = _logits(hidden[rows], weight, temperature)
            log_norm[rows] = torch.logsumexp(logits, dim=-1)
            chosen = logits.gather(-1, labels[rows, None]).squeeze(-1)
            logprobs[rows] = chosen - log_norm[rows]
            mean_logits[rows] = logits.mean(-1)
            is_top1[rows] = chosen >= logits.amax(-1)
            expected = (logits * torch.exp(logits - log_norm[rows, None])).sum(-1)
            entropy[rows] = log_norm[rows] - expected
        ctx.save_for_backward(hidden, weight, labels, log_norm)
        ctx.temperature = temperature
        ctx.input_dtypes = dtypes
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return logprobs, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_norm = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        for rows in _chunks(hidden.shape[0]):
            logits = _logits(hidden[rows], weight, ctx.temperature)
            scale = (grad_logprobs[rows] / ctx.temperature).float()
            # d log p(label) / d logits = onehot(label) - p
            grad_logits = torch.exp(logits - log_norm[rows, None]).mul_(-scale[:, None])
            grad_logits.scatter_add_(-1, labels[rows, None], scale[:, None])
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        hidden_dtype, weight_dtype = ctx.input_dtypes
        return (
            None if grad_hidden is None else grad_hidden.to(hidden_dtype),
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None,
            None,
        )


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the weights'."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
