"""Log-probabilities from hidden states without holding all logits in memory.

The states are multiplied with the head in chunks: matrix products in the weights' dtype, log-sum-exp and probabilities
in float32. The gradient of log softmax is exact and is computed chunk by chunk too, so memory stays at one chunk.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.models.assembly.precision import products_dtype
from alignment.models.forward.flat import MULTIPLE, trunk_states
from alignment.models.forward.rows import FlatRows, next_multiple

CHUNK = 256
"""Tokens projected at once: 256 × 49,152 bfloat16 products are 25 MB."""

IN_CACHE = 2**19
"""Float32 numbers that a pass over logits handles at once on a CPU; 2 MB fit into a core's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """Statistics of the next-token distribution at each labelled position, ``[labels]``, in the order of the labels.

    ``logprobs`` carries gradients (nats); ``entropy`` (nats), ``mean_logits`` and ``is_top1`` do not.
    """

    logprobs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def token_statistics(hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0) -> TokenStatistics:
    """Statistics of ``labels`` under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: ``[tokens, width]`` hidden states, each from the position *before* its label.
        weight: ``[vocabulary, width]`` the head; it gets a gradient if it requires one.
        labels: ``[tokens]`` token ids.
    """
    fields = _ChunkedLogSoftmax.apply(hidden, weight, labels, temperature)
    return TokenStatistics(**dict(zip(_FIELDS, fields, strict=True)))


def label_statistics(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> TokenStatistics:
    """``token_statistics`` under the model's own head."""
    head = model.get_output_embeddings()
    if getattr(head, _ANSWERS, False):
        return TokenStatistics(**dict(zip(_FIELDS, head(hidden, labels, temperature), strict=True)))
    return token_statistics(hidden, head.weight, labels, temperature=temperature)


def answer_labels(head: nn.Module) -> None:
    """Lets a call of the head module compute ``label_statistics``.

    Sharded weights are gathered only while their module is called, and while gradients flow through its outputs.
    """
    head.forward = types.MethodType(_forward_labels, head)
    setattr(head, _ANSWERS, True)


def _forward_labels(
    self: nn.Linear, hidden: Tensor, labels: Tensor | None = None, temperature: float = 1.0
) -> Tensor | tuple[Tensor, ...]:
    if labels is None:
        return type(self).forward(self, hidden)
    fields: tuple[Tensor, ...] = _ChunkedLogSoftmax.apply(hidden, self.weight, labels, temperature)
    return fields


_ANSWERS = "answers_labels"
_FIELDS = ("logprobs", "entropy", "mean_logits", "is_top1")


def transforms_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits differ from ``hidden @ weight.T``: scaled, capped, or with a bias."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return True
    config = model.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return any(getattr(config, name, None) is not None for name in names)


def scalar_at(model: PreTrainedModel, rows: FlatRows, indices: Tensor) -> Tensor:
    """``[indices]`` float32 scores at these indices of the stream: the scalar head's output minus its offset."""
    states = trunk_states(model.base_model, rows)[indices]
    with torch.autocast(states.device.type, enabled=False):
        return model.score(states.float()).squeeze(-1) - model.score_offset


class _ChunkedLogSoftmax(torch.autograd.Function):
    """``[tokens]`` log-probabilities, entropies, mean logits and hits of the labels.

    The gradient of a log-probability is onehot(label) − p, up to the incoming factor. With a frozen head its part of
    the backward pass is therefore done while a chunk's probabilities are in memory. The gradient of a trained head
    mixes the factors of all tokens, so the probabilities are computed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
        compute, dtypes = products_dtype(weight), (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        slopes = torch.empty_like(hidden) if want_hidden and not want_weight else None
        statistics = _Statistics(hidden.shape[0], hidden.device)
        memory = _ChunkMemory(hidden, weight)
        for chunk in _slices(0, hidden.shape[0], CHUNK):
            products = memory.project(hidden[chunk], weight)
            for rows, chunk_products in memory.parts(chunk):
                _score(
                    memory,
                    statistics,
                    rows,
                    chunk_products,
                    labels[rows],
                    temperature=temperature,
                    slope=slopes is not None,
                )
            if slopes is not None:
                slopes[chunk] = memory.project_back(len(products), weight)
        ctx.trained = want_weight
        if want_weight:
            ctx.save_for_backward(hidden, weight, labels, statistics.log_norm)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.temperature = temperature
        ctx.input_dtypes = dtypes
        mean_logits = _mean_logits(hidden, weight) / temperature
        ctx.mark_non_differentiable(statistics.entropy, mean_logits, statistics.is_top1)
        return statistics.logprobs, statistics.entropy, mean_logits, statistics.is_top1

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factors = (grad_logprobs / ctx.temperature).float()
        if ctx.trained:
            grad_hidden, grad_weight = _recomputed(ctx, factors)
            return grad_hidden, grad_weight, None, None
        (slopes,) = ctx.saved_tensors
        return (slopes * factors[:, None]).to(ctx.input_dtypes[0]), None, None, None


def _mean_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``[tokens]``: the mean over the vocabulary, as a product with the mean row of the head."""
    row = torch.full((1, weight.shape[0]), 1.0, dtype=weight.dtype, device=weight.device) @ weight / weight.shape[0]
    return (hidden @ row.T).squeeze(-1).float()


class _Statistics:
    """Statistics of ``[tokens]``, filled chunk by chunk."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.logprobs = torch.empty(count, device=device)
        self.entropy = torch.empty(count, device=device)
        self.log_norm = torch.empty(count, device=device)
        self.is_top1 = torch.empty(count, dtype=torch.bool, device=device)


class _ChunkMemory:
    """Memory for one chunk's products, and for the float32 rows of them that are handled at once.

    It is reused for the next chunk, because new pages for 100 MB cost as much as the arithmetic on them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        count, vocabulary = _whole(min(CHUNK, hidden.shape[0])), weight.shape[0]
        self.at_once = count if hidden.device.type != "cpu" else min(count, max(1, IN_CACHE // vocabulary))
        self._states = hidden.new_zeros(count, hidden.shape[1])
        self._products = torch.empty(count, vocabulary, dtype=hidden.dtype, device=hidden.device)
        self.logits = torch.empty(self.at_once, vocabulary, dtype=torch.float32, device=hidden.device)
        self.shares = torch.empty_like(self.logits)

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``[chunk, vocabulary]`` products of a chunk's states with the head."""
        self._states[: len(hidden)] = hidden
        whole = _whole(len(hidden))
        torch.mm(self._states[:whole], weight.T, out=self._products[:whole])
        return self._products[: len(hidden)]

    def project_back(self, count: int, weight: Tensor) -> Tensor:
        """``[count, width]`` products of the head with the values that replaced a chunk's products."""
        return torch.mm(self._products[: _whole(count)], weight)[:count]

    def parts(self, chunk: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yields the rows of a chunk that are handled at once, as a slice of all rows, and a view of their products."""
        for rows in _slices(chunk.start, chunk.stop, self.at_once):
            yield rows, self._products[rows.start - chunk.start : rows.stop - chunk.start]


def _score(
    memory: _ChunkMemory,
    statistics: _Statistics,
    rows: slice,
    products: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    slope: bool,
) -> None:
    """Fills the statistics of some rows; if ``slope``, replaces their ``products`` by onehot(label) − p."""
    logits = memory.logits[: len(labels)].copy_(products)
    if temperature != 1.0:
        logits.div_(temperature)
    highest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits.sub_(highest), out=memory.shares[: len(labels)])
    total = weights.sum(-1, keepdim=True)
    chosen = logits.gather(-1, labels[:, None]).squeeze(-1)
    log_total = total.log().squeeze(-1)
    statistics.log_norm[rows] = log_total + highest.squeeze(-1)
    statistics.logprobs[rows] = chosen - log_total
    statistics.is_top1[rows] = chosen >= 0
    statistics.entropy[rows] = log_total - logits.mul_(weights).sum(-1) / total.squeeze(-1)
    if slope:
        products.copy_(_log_softmax_slope(weights.div_(total), labels))


def _log_softmax_slope(shares: Tensor, labels: Tensor) -> Tensor:
    """Replaces p ``[rows, vocabulary]`` by onehot(label) − p, in place."""
    at_label = 1 - shares.gather(-1, labels[:, None])
    return shares.neg_().scatter_(-1, labels[:, None], at_label)


def _recomputed(ctx: Any, factors: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients of hidden states and of a trained head."""
    hidden, weight, labels, log_norm = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    memory = _ChunkMemory(hidden, weight)
    for chunk in _slices(0, hidden.shape[0], CHUNK):
        products = memory.project(hidden[chunk], weight)
        for rows, chunk_products in memory.parts(chunk):
            logits = memory.logits[: len(chunk_products)].copy_(chunk_products).div_(ctx.temperature)
            shares = torch.exp(logits.sub_(log_norm[rows, None]), out=memory.shares[: len(chunk_products)])
            chunk_products.copy_(_log_softmax_slope(shares, labels[rows]).mul_(factors[rows, None]))
        if grad_hidden is not None:
            grad_hidden[chunk] = memory.project_back(len(products), weight)
        grad_weight += products.T @ hidden[chunk]
    hidden_dtype, weight_dtype = ctx.input_dtypes
    return None if grad_hidden is None else grad_hidden.to(hidden_dtype), grad_weight.to(weight_dtype)


def _whole(count: int) -> int:
    """A number of rows for which a product of this shape was probably computed before, which costs less."""
    return next_multiple(count, MULTIPLE)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
