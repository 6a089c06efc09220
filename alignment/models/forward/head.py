"""Log-probabilities from hidden states without holding all logits in memory. The states are multiplied with the head in
chunks: matrix products in the weights' dtype, log-sum-exp and probabilities in float32. The gradient of log softmax is
exact and is computed chunk by chunk too, so memory stays at one chunk."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.costs.recorder import one_of_each
from alignment.models.assembly.modules import products_dtype
from alignment.models.forward.flat import MULTIPLE, trunk_states
from alignment.models.forward.rows import FlatRows, next_multiple
from alignment.models.forward.side_by_side import has_two_threads, in_two_threads

CHUNK = 256
"""Tokens projected at once: 256 × 49,152 bfloat16 products are 25 MB."""
IN_CACHE = 2**19
"""Float32 numbers that a pass over logits handles at once on a CPU; 2 MB fit into a core's cache."""


class ChunkMemory:
    """Memory for one chunk's products, and for the float32 rows of them that are handled at once. It is reused for the
    next chunk, because new pages for 100 MB cost as much as the arithmetic on them."""

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


def _whole(count: int) -> int:
    """A number of rows for which a product of this shape was probably computed before, which costs less."""
    return next_multiple(count, MULTIPLE)


def chunks_of(stop: int, *, start: int = 0) -> Iterator[slice]:
    """Yields the tokens from ``start`` to one before ``stop`` that are projected at once."""
    return _slices(start, stop, CHUNK)


def length(rows: slice) -> int:
    """Number of rows of a slice."""
    return int(rows.stop - rows.start)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


HeadFunction = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Computes tensors from hidden states ``[tokens, width]`` and a head's weight ``[vocabulary, width]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """Statistics of the next-token distribution at each labelled position, ``[labels]``, in the order of the labels.
    ``logprobs`` carries gradients (nats); ``mean_logits`` and ``is_top1`` do not. ``entropy`` (nats, of the whole
    distribution) carries them only if the caller asks for it. ``is_top1``: greedy decoding would take the label, which
    of several tokens with the largest logit takes the first."""

    logprobs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def label_statistics(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, *, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenStatistics:
    """Statistics of ``labels [tokens]`` under softmax(z / temperature), with z = hidden @ weight.T of the model's head
    or, with a cap, cap·tanh(hidden @ weight.T / cap). ``hidden [tokens, width]`` are states from the position *before*
    each label. A factor of logits counts as a temperature. With ``entropy_gradient`` the entropies carry gradients; the
    probabilities are then computed twice. Raises ModelError: the head does more."""
    cap, temperature = logit_cap(model), temperature / logit_factor(model)
    fields = through_head(
        model,
        hidden,
        lambda states, weight: _ChunkedLogSoftmax.apply(states, weight, labels, temperature, entropy_gradient, cap),
    )
    return TokenStatistics(**dict(zip(_FIELDS, fields, strict=True)))


def through_head(model: PreTrainedModel, hidden: Tensor, function: HeadFunction) -> tuple[Tensor, ...]:
    """``function`` of hidden states and of the weight of the model's head, in a call of the head if it wants one."""
    head = model.get_output_embeddings()
    outputs: tuple[Tensor, ...] = head(hidden, function) if hasattr(head, _CALLED) else function(hidden, head.weight)
    return outputs


def read_in_calls_only(head: nn.Module) -> None:
    """Makes ``through_head`` call the head module. Sharded weights are gathered only while their module is called, and
    while gradients flow through its outputs."""
    head.forward = types.MethodType(_forward, head)
    setattr(head, _CALLED, True)


def _forward(self: nn.Linear, hidden: Tensor, function: HeadFunction | None = None) -> Tensor | tuple[Tensor, ...]:
    return type(self).forward(self, hidden) if function is None else function(hidden, self.weight)


_CALLED = "is_read_in_calls_only"
_FIELDS = ("logprobs", "entropy", "mean_logits", "is_top1")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names in configurations for the bound of logits: of Gemma, RecurrentGemma and xLSTM."""
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "logits_mup_width_multiplier")
"""Names in configurations for factors of logits, or of the states that they are computed from."""
_FACTORS = ("logit_scale", "logits_scaling")


def logit_cap(model: PreTrainedModel) -> float | None:
    """The bound of the model's logits (Gemma Team 2024, section 2), if they have one."""
    config = model.config.get_text_config()
    caps: list[float | None] = [getattr(config, name, None) for name in _CAPS]
    return next((cap for cap in caps if cap is not None), None)


def logit_factor(model: PreTrainedModel) -> float:
    """By what the model multiplies its logits, as Cohere and Granite do; else 1. Raises ModelError: it changes them in
    another way, beside a cap."""
    config = model.config.get_text_config()
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    others = any(getattr(config, name, None) is not None for name in _SCALES if name not in _FACTORS)
    if others or _has_bias(model) or (factor != 1.0 and logit_cap(model) is not None):
        raise ModelError(
            f"{type(model).__name__} scales its logits by more than a factor, or adds a bias to them",
            where="model.source",
            remedy="PPO, evaluation and precompute_reference do not support this; other stages do",
        )
    return factor


def _has_bias(model: PreTrainedModel) -> bool:
    return getattr(model.get_output_embeddings(), "bias", None) is not None


def scales_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits are scaled or have a bias, beside a cap."""
    config = model.config.get_text_config()
    return _has_bias(model) or any(getattr(config, name, None) is not None for name in _SCALES)


def scalar_at(model: PreTrainedModel, rows: FlatRows, indices: Tensor) -> Tensor:
    """``[indices]`` float32 scores at these indices of the stream: the scalar head's output minus its offset."""
    states = trunk_states(model.base_model, rows)[indices]
    with torch.autocast(states.device.type, enabled=False):
        return model.score(states.float()).squeeze(-1) - model.score_offset


class _ChunkedLogSoftmax(torch.autograd.Function):
    """``[tokens]`` log-probabilities, entropies, mean logits and hits of the labels. The gradient of a log-probability
    is onehot(label) − p, up to the incoming factor. With a frozen head its part of the backward pass is therefore done
    while a chunk's probabilities are in memory. The gradient of a trained head mixes the factors of all tokens, and an
    entropy has a gradient of its own, −p·(log p + entropy); in both cases the probabilities are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        entropy_gradient: bool,
        cap: float | None,
    ) -> tuple[Tensor, ...]:
        compute, dtypes = products_dtype(weight), (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        ctx.recomputes = want_weight or entropy_gradient
        slopes = torch.empty_like(hidden) if want_hidden and not ctx.recomputes else None
        statistics = _Statistics(hidden.shape[0], hidden.device)

        def score(tokens: range) -> None:
            memory = ChunkMemory(hidden, weight)
            for chunk in one_of_each(chunks_of(tokens.stop, start=tokens.start), length):
                products = memory.project(hidden[chunk], weight)
                for rows, chunk_products in one_of_each(memory.parts(chunk), lambda part: length(part[0])):
                    _score(
                        memory,
                        statistics,
                        rows,
                        chunk_products,
                        labels[rows],
                        temperature=temperature,
                        cap=cap,
                        slope=slopes is not None,
                    )
                if slopes is not None:
                    slopes[chunk] = memory.project_back(len(products), weight)

        count = hidden.shape[0]
        if len(list(chunks_of(count))) > 1 and has_two_threads(hidden):
            in_two_threads(score, (range(count // 2), range(count // 2, count)))
        else:
            score(range(count))
        if ctx.recomputes:
            ctx.save_for_backward(hidden, weight, labels, statistics.log_norm, statistics.entropy)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.temperature, ctx.cap = temperature, cap
        ctx.entropy_gradient = entropy_gradient
        ctx.input_dtypes = dtypes
        mean_logits = (_mean_logits(hidden, weight) if cap is None else statistics.mean_logits) / temperature
        constants = () if entropy_gradient else (statistics.entropy,)
        ctx.mark_non_differentiable(*constants, mean_logits, statistics.is_top1)
        return statistics.logprobs, statistics.entropy, mean_logits, statistics.is_top1

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factors = (grad_logprobs / ctx.temperature).float()
        if ctx.recomputes:
            entropy_factors = (grad_entropy / ctx.temperature).float() if ctx.entropy_gradient else None
            return *_recomputed(ctx, factors, entropy_factors), None, None, None, None
        (slopes,) = ctx.saved_tensors
        return (slopes * factors[:, None]).to(ctx.input_dtypes[0]), None, None, None, None, None


def _mean_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``[tokens]``: the mean over the vocabulary, as a product with the mean row of the head."""
    row = torch.full((1, weight.shape[0]), 1.0, dtype=weight.dtype, device=weight.device) @ weight / weight.shape[0]
    return (hidden @ row.T).squeeze(-1).float()


class _Statistics:
    def __init__(self, count: int, device: torch.device) -> None:
        self.logprobs = torch.empty(count, device=device)
        self.entropy = torch.empty(count, device=device)
        self.log_norm = torch.empty(count, device=device)
        self.mean_logits = torch.empty(count, device=device)
        self.is_top1 = torch.empty(count, dtype=torch.bool, device=device)


def _score(
    memory: ChunkMemory,
    statistics: _Statistics,
    rows: slice,
    products: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    cap: float | None,
    slope: bool,
) -> None:
    """Fills the statistics of some rows; if ``slope``, replaces their ``products`` by the slope of the label's
    log-probability in them, times the temperature."""
    logits = capped(memory.logits[: len(labels)].copy_(products), cap)
    if cap is not None:
        statistics.mean_logits[rows] = logits.mean(-1)
    if temperature != 1.0:
        logits.div_(temperature)
    highest, first_choice = logits.max(-1, keepdim=True)  # the first of tied tokens, as greedy decoding takes
    weights = torch.exp(logits.sub_(highest), out=memory.shares[: len(labels)])
    total = weights.sum(-1, keepdim=True)
    chosen = logits.gather(-1, labels[:, None]).squeeze(-1)
    log_total = total.log().squeeze(-1)
    statistics.log_norm[rows] = log_total + highest.squeeze(-1)
    statistics.logprobs[rows] = chosen - log_total
    statistics.is_top1[rows] = first_choice.squeeze(-1) == labels
    statistics.entropy[rows] = log_total - logits.mul_(weights).sum(-1) / total.squeeze(-1)
    if slope:
        slopes = _log_softmax_slope(weights.div_(total), labels)
        products.copy_(slopes if cap is None else slopes.mul_(_cap_slope(logits.copy_(products), cap)))


def capped(products: Tensor, cap: float | None) -> Tensor:
    """Replaces x by c·tanh(x / c), or leaves it without a cap."""
    return products if cap is None else products.div_(cap).tanh_().mul_(cap)


def _cap_slope(products: Tensor, cap: float) -> Tensor:
    """d c·tanh(x / c) / dx = 1 − tanh²(x / c), in place."""
    return products.div_(cap).tanh_().square_().neg_().add_(1.0)


def _log_softmax_slope(shares: Tensor, labels: Tensor) -> Tensor:
    """Replaces p ``[rows, vocabulary]`` by onehot(label) − p, in place."""
    at_label = 1 - shares.gather(-1, labels[:, None])
    return shares.neg_().scatter_(-1, labels[:, None], at_label)


def _recomputed(ctx: Any, factors: Tensor, entropy_factors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, labels, log_norm, entropy = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
    memory = ChunkMemory(hidden, weight)
    for chunk in one_of_each(chunks_of(hidden.shape[0]), length):
        products = memory.project(hidden[chunk], weight)
        for rows, chunk_products in one_of_each(memory.parts(chunk), lambda part: length(part[0])):
            logits = capped(memory.logits[: len(chunk_products)].copy_(chunk_products), ctx.cap).div_(ctx.temperature)
            shares = torch.exp(logits.sub_(log_norm[rows, None]), out=memory.shares[: len(chunk_products)])
            bend = None if entropy_factors is None else logits.add_(entropy[rows, None]).mul_(shares)
            slopes = _log_softmax_slope(shares, labels[rows]).mul_(factors[rows, None])
            if bend is not None and entropy_factors is not None:
                slopes.sub_(bend.mul_(entropy_factors[rows, None]))
            if ctx.cap is not None:
                slopes.mul_(_cap_slope(logits.copy_(chunk_products), ctx.cap))
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
