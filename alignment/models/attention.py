"""Attention inside the rows of a stream, as a function that transformers' models call (AttentionInterface).

On CPU a row whose queries fit into one block is two matrix products with a softmax between, which is kept for the
backward pass; rows that follow one another behind the same beginning, such as n answers to a prompt, are one block as
far as they fit. A longer row is one call of scaled-dot-product attention. The backward pass is written out, because
PyTorch's flash kernel for CPU took four times as long as the matrix products that it is made of. On CUDA all rows are
one call of the variable-length kernel. A shared beginning is gathered in front of the row's own keys and
values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignment.models.precision import products_dtype
from alignment.models.rows import Range, Segment

ATTENTION = "flat_sdpa"

QUERIES = 256
"""Queries whose scores are held at once: 9 heads × 256 × 2,048 bfloat16 are 9 MB."""


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Of every layer by its number, ``[key heads, tokens, head width]`` keys and values of a stream."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Keys that stand before a stream's own: ``prefix`` ones, which every query sees, then ``read`` of an earlier
    stream."""

    prefix: int = 0
    read: int = 0

    def shifted(self, span: Range) -> Range:
        """A range of the stream among all keys."""
        return span[0] + self.prefix + self.read, span[1] + self.prefix + self.read


def flat_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head width]
    key: Tensor,  # [1, key heads, tokens, head width]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | None = None,
    prefix: Tensor | None = None,  # [2 · layers, key heads, virtual tokens, head width]
    kept: KeysValues | None = None,
    earlier: KeysValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``[1, tokens, heads, value width]``; without ``segments`` the batch is padded and goes to the standard function.

    ``kept`` gets the layer's keys and values; ``earlier`` has those of a stream before this one.

    Raises:
        ValueError: the model asks for something that this function does not have: dropout on attention weights, a bias
            or a learned mask, sinks, capped scores.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unusual = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    unusual += ["dropout"] * bool(dropout)
    unusual += ["attention_mask"] * (attention_mask is not None and attention_mask.numel() != 1)
    if unusual:
        raise ValueError(f"{type(module).__name__} asks attention for {', '.join(unusual)}, which a flat stream lacks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary positions may leave queries and keys in float32 where autocast has values in bfloat16.
    query, key, value = (states.to(products_dtype(value)) for states in (query, key, value))
    keys, values, ahead = _with_earlier(module, key[0], value[0], prefix=prefix, kept=kept, earlier=earlier)
    if _has_kernel(query, value):
        return _varlen(query[0], keys, values, segments, scale, ahead)[None], None
    blocks = _blocks(tuple(segments), ahead, query.dtype, query.device)
    attended = _RowAttention.apply(query[0], keys, values, blocks, scale)
    return attended.transpose(0, 1)[None], None


def _with_earlier(
    module: Any,
    keys: Tensor,
    values: Tensor,
    *,
    prefix: Tensor | None,
    kept: KeysValues | None,
    earlier: KeysValues | None,
) -> tuple[Tensor, Tensor, _Ahead]:
    """A layer's keys and values of the stream behind those that stand before it, and how many these are."""
    ahead = _Ahead()
    if kept is not None:
        kept.layers[module.layer_idx] = keys.contiguous(), values.contiguous()  # not as views of larger products
    if earlier is not None:
        read_keys, read_values = earlier.layers[module.layer_idx]
        keys, values = torch.cat([read_keys, keys], dim=1), torch.cat([read_values, values], dim=1)
        ahead = _Ahead(read=read_keys.shape[1])
    if prefix is not None:
        own_keys, own_values = prefix.unflatten(0, (-1, 2))[module.layer_idx]
        keys, values = torch.cat([own_keys.to(keys), keys], dim=1), torch.cat([own_values.to(values), values], dim=1)
        ahead = replace(ahead, prefix=own_keys.shape[1])
    return keys, values, ahead


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether CUDA's variable-length kernel takes these: half precision, values as wide as keys."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and half and query.shape[-1] == value.shape[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Queries of one row, or of several behind the same beginning, that are computed in one call.

    ``hidden`` is ``[queries, keys]``, −∞ where a query does not see a key, else 0; None where each query sees all keys
    up to itself.
    """

    own: Range
    keys: tuple[Range, ...]
    hidden: Tensor | None

    @property
    def is_small(self) -> bool:
        """Whether its weights are computed as they are written, and kept for the backward pass."""
        return self.own[1] - self.own[0] <= QUERIES

    def hidden_among(self, first: int, last: int, like: Tensor) -> Tensor:
        """``[last - first] × 2``: what the queries of these places hide of their own keys; ``like`` has the dtype."""
        count = last - first
        if self.hidden is None:
            return _later(count, like.dtype, like.device)
        seen = self.hidden.shape[1] - (self.own[1] - last)
        return self.hidden[first - self.own[0] : last - self.own[0], seen - count : seen]


@functools.lru_cache(maxsize=4)  # all layers, and the models that read the same stream, ask for the same ones
def _blocks(
    segments: tuple[Segment, ...], ahead: _Ahead, dtype: torch.dtype, device: torch.device
) -> tuple[_Block, ...]:
    """The calls that a stream takes."""
    found = []
    for rows in _alike(segments):
        own, before = (rows[0].own[0], rows[-1].own[1]), _behind(rows[0].before, ahead)
        hidden = None
        if before:
            lengths = [end - start for start, end in (row.own for row in rows)]
            among = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
            own_hidden = torch.zeros(among.shape, dtype=dtype).masked_fill_(~among, float("-inf"))
            hidden = nn.functional.pad(own_hidden, (sum(end - start for start, end in before), 0)).to(device)
        found.append(_Block(own=own, keys=(*before, ahead.shifted(own)), hidden=hidden))
    return tuple(found)


def _behind(ranges: Sequence[Range], ahead: _Ahead) -> tuple[Range, ...]:
    """Ranges of a stream among all keys; those of a prefix come first."""
    return (*(((0, ahead.prefix),) if ahead.prefix else ()), *map(ahead.shifted, ranges))


def _alike(segments: tuple[Segment, ...]) -> Iterator[list[Segment]]:
    """Runs of rows behind the same shared beginning whose queries fit into one block, and all others one by one."""
    run: list[Segment] = []
    for segment in segments:
        if segment.own[0] == segment.own[1]:
            continue
        same = run and segment.before and segment.before == run[0].before
        if run and not (same and segment.own[1] - run[0].own[0] <= QUERIES):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


class _RowAttention(torch.autograd.Function):
    """``[heads, tokens, width]`` queries on ``[key heads, tokens, width]`` keys and values, block by block."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[_Block, ...], scale: float
    ) -> Tensor:
        attended = query.new_empty(*query.shape[:2], value.shape[-1])
        kept = []
        for block in blocks:
            start, end = block.own
            queries, keys, values = query[:, start:end], _gathered(key, block.keys), _gathered(value, block.keys)
            if block.is_small:
                weights = _weights(_grouped(queries, key.shape[0]), keys, block.hidden_among(start, end, query), scale)
                attended[:, start:end] = torch.bmm(weights, values).view(-1, end - start, value.shape[-1])
                kept.append(weights)
            else:
                attended[:, start:end] = nn.functional.scaled_dot_product_attention(
                    queries[None],
                    keys[None],
                    values[None],
                    attn_mask=block.hidden,
                    is_causal=block.hidden is None,
                    scale=scale,
                    enable_gqa=query.shape[0] != key.shape[0],
                )[0]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        grad, weights = grad.to(query.dtype), iter(kept)
        for block in ctx.blocks:
            of_block = next(weights) if block.is_small else None
            _block_backward((query, key, value), grads, grad, block, of_block, ctx.scale)
        return *grads, None, None


def _block_backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    block: _Block,
    kept: Tensor | None,
    scale: float,
) -> None:
    """Adds one block's share to the gradients. Weights that were not ``kept`` are computed again, some queries at a
    time on the keys they see."""
    (query, key, value), (grad_query, grad_key, grad_value) = inputs, grads
    heads, (start, end) = key.shape[0], block.own
    keys, values = _gathered(key, block.keys), _gathered(value, block.keys)
    earlier = keys.shape[1] - (end - start)
    for first in range(start, end, QUERIES):
        last = min(first + QUERIES, end)
        seen = slice(earlier + last - start)
        queries, queries_grad = (_grouped(states[:, first:last], heads) for states in (query, grad))
        weights = kept
        if weights is None:
            weights = _weights(queries, keys[:, seen], block.hidden_among(first, last, query), scale)
        own = _query_gradients(queries, keys[:, seen], values[:, seen], weights, queries_grad, scale)
        grad_query[:, first:last] = own[0].view(-1, last - first, query.shape[-1])
        _scatter_add(grad_key, block.keys, own[1])
        _scatter_add(grad_value, block.keys, own[2])


def _grouped(states: Tensor, heads: int) -> Tensor:
    """``[heads, …]`` of a block of queries: those of heads that share a key head stand below one another."""
    return states.reshape(heads, -1, states.shape[-1])


def _weights(query: Tensor, key: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax(scale·q kᵀ), ``[heads, queries, keys]``; the last keys are the queries' own.

    ``hidden`` is ``[count, count]`` about these last keys, −∞ on those that a query does not see, else 0; queries are
    some times ``count``. In bfloat16 scores are rounded before the softmax, as transformers' eager attention does.
    """
    count, seen = hidden.shape[0], key.shape[1]
    scores = torch.bmm(query * scale, key.transpose(1, 2))
    scores.view(key.shape[0], -1, count, seen)[..., seen - count :].add_(hidden)
    return torch.softmax(scores, dim=-1)


def _query_gradients(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(scale·q kᵀ) v for ``[heads, queries or keys, width]``, given the softmax."""
    grad_value = torch.bmm(weights.transpose(1, 2), grad)
    grad_weights = torch.bmm(grad, value.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_query = torch.bmm(grad_scores, key).mul_(scale)
    grad_key = torch.bmm(grad_scores.transpose(1, 2), query).mul_(scale)
    return grad_query, grad_key, grad_value


@functools.lru_cache(maxsize=QUERIES)
def _later(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[count, count]``: −∞ where the key comes after the query. Adding it is faster than filling by a mask."""
    return torch.full((count, count), float("-inf"), dtype=dtype, device=device).triu(1)


def _gathered(tensor: Tensor, ranges: Sequence[Range]) -> Tensor:
    """The places of ``ranges`` along dimension 1; a view where they are one range."""
    pieces = [tensor[:, start:end] for start, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _scatter_add(into: Tensor, ranges: Sequence[Range], values: Tensor) -> None:
    """Adds ``values``, which may end before the ranges do, along dimension 1."""
    offset = 0
    for start, end in ranges:
        count = min(end - start, values.shape[1] - offset)
        into[:, start : start + count] += values[:, offset : offset + count]
        offset += count


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float, ahead: _Ahead
) -> Tensor:
    """``[tokens, heads, width]`` by one kernel call on CUDA; queries are aligned with the end of their keys."""
    from torch.nn.attention.varlen import varlen_attn

    own = [end - start for segment in segments for start, end in [segment.own] if end > start]
    rows = [_behind(segment.keys, ahead) for segment in segments if segment.own[1] > segment.own[0]]
    whole = [sum(end - start for start, end in ranges) for ranges in rows]
    if ahead != _Ahead() or any(segment.before for segment in segments):
        places = torch.cat([torch.arange(start, end) for ranges in rows for start, end in ranges]).to(key.device)
        key, value = key.index_select(1, places), value.index_select(1, places)
    attended = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        _offsets(own, query.device),
        _offsets(whole, query.device),
        max(own),
        max(whole),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )
    assert isinstance(attended, Tensor)  # the log-sum-exp comes with it only on request
    return attended


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


AttentionInterface.register(ATTENTION, flat_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
