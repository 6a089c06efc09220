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

    ``logprobs`` carries gradients (nats); ``mean_logits`` and ``is_top1`` do not. ``entropy`` (nats, of the whole
    distribution) carries them only if the caller asks for it.
    """

    logprobs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def token_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenStatistics:
    """Statistics of ``labels`` under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: ``[tokens, width]`` hidden states, each from the position *before* its label.
        weight: ``[vocabulary, width]`` the head; it gets a gradient if it requires one.
        labels: ``[tokens]`` token ids.
        entropy_gradient: whether the entropies carry gradients; the probabilities are then computed twice.
    """
    fields = _ChunkedLogSoftmax.apply(hidden, weight, labels, temperature, entropy_gradient)
    return TokenStatistics(**dict(zip(_FIELDS, fields, strict=True)))


def label_statistics(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """``token_statistics`` under the model's own head."""
    head = model.get_output_embeddings()
    if getattr(head, _ANSWERS, False):
        fields = head(hidden, labels, temperature, entropy_gradient)
        return TokenStatistics(**dict(zip(_FIELDS, fields, strict=True)))
    return token_statistics(hidden, head.weight, labels, temperature=temperature, entropy_gradient=entropy_gradient)


def answer_labels(head: nn.Module) -> None:
    """Lets a call of the head module compute ``label_statistics``.

    Sharded weights are gathered only while their module is called, and while gradients flow through its outputs.
    """
    head.forward = types.MethodType(_forward_labels, head)
    setattr(head, _ANSWERS, True)


def _forward_labels(
    self: nn.Linear,
    hidden: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    if labels is None:
        return type(self).forward(self, hidden)
    fields: tuple[Tensor, ...] = _ChunkedLogSoftmax.apply(hidden, self.weight, labels, temperature, entropy_gradient)
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
    mixes the factors of all tokens, and an entropy has a gradient of its own, −p·(log p + entropy); in both cases the
    probabilities are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, ...]:
        compute, dtypes = products_dtype(weight), (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        ctx.recomputes = want_weight or entropy_gradient
        slopes = torch.empty_like(hidden) if want_hidden and not ctx.recomputes else None
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
        if ctx.recomputes:
            ctx.save_for_backward(hidden, weight, labels, statistics.log_norm, statistics.entropy)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.temperature = temperature
        ctx.entropy_gradient = entropy_gradient
        ctx.input_dtypes = dtypes
        mean_logits = _mean_logits(hidden, weight) / temperature
        constants = () if entropy_gradient else (statistics.entropy,)
        ctx.mark_non_differentiable(*constants, mean_logits, statistics.is_top1)
        return statistics.logprobs, statistics.entropy, mean_logits, statistics.is_top1

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factors = (grad_logprobs / ctx.temperature).float()
        if ctx.recomputes:
            entropy_factors = (grad_entropy / ctx.temperature).float() if ctx.entropy_gradient else None
            return *_recomputed(ctx, factors, entropy_factors), None, None, None
        (slopes,) = ctx.saved_tensors
        return (slopes * factors[:, None]).to(ctx.input_dtypes[0]), None, None, None, None


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


def _recomputed(ctx: Any, factors: Tensor, entropy_factors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and of the head, each if it needs one."""
    hidden, weight, labels, log_norm, entropy = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
    memory = _ChunkMemory(hidden, weight)
    for chunk in _slices(0, hidden.shape[0], CHUNK):
        products = memory.project(hidden[chunk], weight)
        for rows, chunk_products in memory.parts(chunk):
            logits = memory.logits[: len(chunk_products)].copy_(chunk_products).div_(ctx.temperature)
            shares = torch.exp(logits.sub_(log_norm[rows, None]), out=memory.shares[: len(chunk_products)])
            bend = None if entropy_factors is None else logits.add_(entropy[rows, None]).mul_(shares)
            slopes = _log_softmax_slope(shares, labels[rows]).mul_(factors[rows, None])
            if bend is not None and entropy_factors is not None:
                slopes.sub_(bend.mul_(entropy_factors[rows, None]))
            chunk_products.copy_(slopes)
        if grad_hidden is not None:
            grad_hidden[chunk] = memory.project_back(len(products), weight)
        if grad_weight is not None:
            grad_weight += products.T @ hidden[chunk]
    hidden_dtype, weight_dtype = ctx.input_dtypes
    return (
        None if grad_hidden is None else grad_hidden.to(hidden_dtype),
        None if grad_weight is None else grad_weight.to(weight_dtype),
    )


def _whole(count: int) -> int:
    """A number of rows for which a product of this shape was probably computed before, which costs less."""
    return next_multiple(count, MULTIPLE)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
