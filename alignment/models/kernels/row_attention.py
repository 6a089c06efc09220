"""Attention inside the rows of a stream on a CPU, with rows of similar sizes in one product. A single row is too little
work for two cores, and its many small calls take longer than the arithmetic. So spans of rows are put into groups and
padded to the most queries and keys in the group: two batched matrix products with a softmax between. The softmax of
short rows is stored for the backward pass. A long row is one forward call of scaled-dot-product attention, and its
softmax is computed again in the backward pass, span by span. That is written out here, because PyTorch's flash kernel
for CPU took four times as long as the matrix products that it consists of. Query heads that share keys (Ainslie et al.
2023, grouped-query attention) are in one product. With a sliding window (Beltagy et al. 2020) a query sees only the
last keys up to its own; spans leave the others out. Capped scores (Gemma Team 2024, section 2) are c·tanh(s / c). Long
rows then go span by span in the forward pass, too."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignment.models.forward.rows import Range, next_multiple, on_device

QUERIES = 256
"""Number of queries up to which a row is short; its stored softmax grows with their square."""
SPAN = 128
"""Maximum number of a row's queries in one span; with fewer queries, fewer scores are masked."""
MULTIPLE = 16
"""Queries, and keys before them, are padded to multiples of it, because a product's shape costs less the second
time."""
SCORES = 2**18
"""Maximum number of a head's scores in a product of several spans."""
CALL = 2**14
"""Estimated cost of one more product, as the number of a head's scores that could be computed meanwhile."""


@dataclass(frozen=True, slots=True)
class Row:
    """Queries at ``own`` of the stream. Their keys are at ``keys`` among all keys; the last range is their own."""

    own: Range
    keys: tuple[Range, ...]

    @property
    def queries(self) -> int:
        return self.own[1] - self.own[0]

    @property
    def earlier(self) -> int:
        """Number of keys before its own."""
        return sum(end - start for start, end in self.keys) - self.queries


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How a query's scores are computed: ``scale``·q kᵀ of the last ``window`` keys up to its own, or of all, bounded
    to ±``cap`` if there is one."""

    scale: float
    window: int | None = None
    cap: float | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, rows: tuple[Row, ...], scores: Scores) -> Tensor:
    """``[heads, tokens, value width]``: softmax(scores) v inside rows; a query sees no key after its own. In bfloat16
    scores are rounded before the softmax, as in transformers' eager attention.

    Args:
        query: ``[heads, tokens, width]``; every token is in one of ``rows``.
        key: ``[key heads, keys, width]``; each key head serves equally many query heads.
        value: ``[key heads, keys, value width]``.
        scores: the window counts keys in the order of ``Row.keys``."""
    by_span = scores.window is not None or scores.cap is not None
    plan = _plan(rows, key.shape[0], query.dtype, query.device, scores.window, by_span)
    attended: Tensor = _RowAttention.apply(query, key, value, plan, scores)
    return attended


# ---- which rows are computed together ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Rows, or spans of rows, in one batched product: one matrix per row and key head; those of a head are adjacent.
    ``queries`` and ``keys`` are their slices of the lines of all groups. ``hidden`` is ``[1 or rows, queries, keys]``:
    −∞ where a query does not see a key, else 0."""

    matrices: int
    queries: slice
    keys: slice
    hidden: Tensor

    def of_queries(self, lines: Tensor, width: int) -> Tensor:
        return lines[self.queries].view(self.matrices, -1, width)

    def of_keys(self, lines: Tensor) -> Tensor:
        return lines[self.keys].view(self.matrices, -1, lines.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """The products for a stream. ``stored`` groups hold short rows, whose softmax is stored; ``recomputed`` groups hold
    spans of long rows. They are only for the backward pass if ``long`` has these rows, and else for both. A line is a
    token under one key head, with the number ``token · key heads + head``. ``queries`` and ``keys`` are the lines in
    the groups, including those that pad rows. ``padding`` holds the indices in the groups of padding queries, and
    ``indices`` the index in the groups of each line of the stream."""

    stored: tuple[_Group, ...]
    recomputed: tuple[_Group, ...]
    long: tuple[tuple[Row, Tensor | None], ...]
    """Long rows that scaled-dot-product attention serves, each with its mask ``hidden [1, queries, keys]`` if it has
    keys before its own."""
    queries: Tensor
    keys: Tensor
    padding: Tensor
    indices: Tensor


@functools.lru_cache(maxsize=4)  # layers of a kind, and models that read the same stream, need the same plan
def _plan(
    rows: tuple[Row, ...],
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
    by_span: bool = False,
) -> _Plan:
    short, long = ([row for row in rows if (row.queries > QUERIES) is longer] for longer in (False, True))
    builder = _GroupBuilder(max(row.own[1] for row in rows), heads, dtype, device, window)
    return _Plan(
        stored=tuple(builder.groups(short)),
        recomputed=tuple(builder.groups(long)),
        long=()
        if by_span
        else tuple((row, on_device(_hidden_of(row, dtype), device) if row.earlier else None) for row in long),
        **builder.lines(),
    )


def forget_plans() -> None:
    """Frees the masks of the last plans; else a plan of shadows outlives what it was made for."""
    _plan.cache_clear()


class _GroupBuilder:
    def __init__(self, tokens: int, heads: int, dtype: torch.dtype, device: torch.device, window: int | None) -> None:
        self._heads, self._dtype, self._device, self._window = heads, dtype, device, window
        self._indices = torch.zeros(tokens, heads, dtype=torch.long)
        self._queries, self._keys, self._padding = ([torch.zeros(0, dtype=torch.long)] for _ in range(3))
        self._ends = 0, 0

    def groups(self, rows: Sequence[Row]) -> Iterator[_Group]:
        spans = sorted(
            (span for row in rows for span in _spans(row, self._window)), key=lambda row: (row.queries, row.earlier)
        )
        for first, last in _cuts([(_whole(span.queries), _whole(span.earlier)) for span in spans]):
            yield self._group(spans[first:last])

    def _group(self, rows: Sequence[Row]) -> _Group:
        own, seen, real = _padded(rows)
        (start, end), (keys_start, keys_end) = (
            (before, before + self._heads * tokens.numel())
            for before, tokens in zip(self._ends, (own, seen), strict=True)
        )
        self._ends = end, keys_end
        slots = torch.arange(start, end).view(self._heads, *own.shape)
        self._indices[own[real]] = slots[:, real].T
        self._padding.append(slots[:, ~real].flatten())
        self._queries.append(_lines_of(own, self._heads))
        self._keys.append(_lines_of(seen, self._heads))
        return _Group(
            matrices=self._heads * len(rows),
            queries=slice(start, end),
            keys=slice(keys_start, keys_end),
            hidden=on_device(
                _hidden([row.earlier for row in rows], (own.shape[1], seen.shape[1]), self._dtype, self._window),
                self._device,
            ),
        )

    def lines(self) -> dict[str, Tensor]:
        lines_of_groups = {"queries": self._queries, "keys": self._keys, "padding": self._padding}
        joined = {name: torch.cat(lines) for name, lines in lines_of_groups.items()} | {
            "indices": self._indices.flatten()
        }
        return {name: on_device(lines, self._device) for name, lines in joined.items()}


def _spans(row: Row, window: int | None) -> Iterator[Row]:
    start, end = row.own
    own_keys = row.keys[-1][0]
    for first in range(start, end, SPAN):
        last = min(first + SPAN, end)
        keys = (*row.keys[:-1], (own_keys, own_keys + last - start))
        unseen = 0 if window is None else max(0, row.earlier + first - start + 1 - window)
        yield Row((first, last), _without_first(keys, unseen))


def _without_first(ranges: Sequence[Range], count: int) -> tuple[Range, ...]:
    left = []
    for start, end in ranges:
        dropped = min(count, end - start)
        count -= dropped
        if start + dropped < end:
            left.append((start + dropped, end))
    return tuple(left)


def _cuts(sizes: Sequence[tuple[int, int]]) -> list[Range]:
    """The cuts of rows of these numbers of queries and earlier keys for which calls and scores together cost least."""
    costs, starts = [0], [0]
    for end in range(1, len(sizes) + 1):
        options: list[tuple[int, int]] = []
        queries = earlier = 0
        for start in reversed(range(end)):
            queries, earlier = max(queries, sizes[start][0]), max(earlier, sizes[start][1])
            scores = (end - start) * queries * (queries + earlier)
            if options and scores > SCORES:
                break
            options.append((costs[start] + scores + CALL, start))
        cost, start = min(options)
        costs.append(cost)
        starts.append(start)
    ranges, end = [], len(sizes)
    while end:
        ranges.append((starts[end], end))
        end = starts[end]
    return ranges


def _padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, queries]`` tokens, ``[rows, earlier + queries]`` keys, and a mask of the tokens that are not padding.
    Padding follows queries and their keys, and precedes earlier keys. It repeats the row's own first token, so that NaN
    stays in its row."""
    most, earlier = _whole(max(row.queries for row in rows)), _whole(max(row.earlier for row in rows))
    own = torch.zeros(len(rows), most, dtype=torch.long)
    seen = torch.zeros(len(rows), earlier + most, dtype=torch.long)
    for number, row in enumerate(rows):
        own[number], seen[number] = row.own[0], row.keys[-1][0]
        own[number, : row.queries] = torch.arange(*row.own)
        keys = torch.cat([torch.arange(*span) for span in row.keys])
        seen[number, earlier - row.earlier : earlier + row.queries] = keys
    return own, seen, torch.arange(most) < torch.tensor([row.queries for row in rows])[:, None]


def _lines_of(tokens: Tensor, heads: int) -> Tensor:
    return (tokens.flatten() * heads + torch.arange(heads)[:, None]).flatten()


def _whole(count: int) -> int:
    return next_multiple(count, MULTIPLE)


def _hidden(earlier: Sequence[int], shape: tuple[int, int], dtype: torch.dtype, window: int | None = None) -> Tensor:
    """``[1 or rows, queries, keys]`` of this ``shape``: −∞ on a query's later keys, on those before its ``window``, and
    on padding of earlier keys, else 0. It has one row if all rows have equally many earlier keys."""
    queries, keys = shape
    most, columns = keys - queries, torch.arange(keys)
    padding = most - torch.tensor(earlier if len(set(earlier)) > 1 else earlier[:1])
    last = most + torch.arange(queries)[:, None]
    unseen = (columns < padding[:, None, None]) | (columns > last)
    if window is not None:
        unseen |= columns <= last - window
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, float("-inf"))


def _hidden_of(row: Row, dtype: torch.dtype) -> Tensor:
    return _hidden([row.earlier], (row.queries, row.earlier + row.queries), dtype)


# ---- the function ------------------------------------------------------------------------------------------------


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, scores: Scores) -> Tensor:
        heads, widths = key.shape[0], (query.shape[-1], value.shape[-1])
        lines = [_lines(states, heads) for states in (query, key, value)]
        queries, keys, values = _gathered(lines, plan)
        attended_lines = queries.new_empty(len(queries), query.shape[0] // heads * widths[1])
        stored = []
        for number, group in enumerate((*plan.stored, *(() if plan.long else plan.recomputed))):
            weights = _weights(group.of_queries(queries, widths[0]), group.of_keys(keys), group.hidden, scores)
            torch.bmm(weights, group.of_keys(values), out=group.of_queries(attended_lines, widths[1]))
            if number < len(plan.stored):
                stored.append(weights)
        attended = _spread(attended_lines, plan, query.shape[:2])
        for row, hidden in plan.long:
            attended[:, slice(*row.own)] = _long(query, key, value, row, hidden, scores.scale)
        ctx.save_for_backward(query, key, value, *stored)
        ctx.plan, ctx.scores = plan, scores
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *stored = ctx.saved_tensors
        plan, heads, widths = ctx.plan, key.shape[0], (query.shape[-1], value.shape[-1])
        grad = grad.to(query.dtype)
        lines = [_lines(states, heads) for states in (query, key, value)]
        queries, keys, values = _gathered(lines, plan)
        grads = _lines(grad, heads).index_select(0, plan.queries)
        grads.index_fill_(0, plan.padding, 0.0)  # so that padding queries contribute nothing to the keys that they see
        grads_of_lines = [torch.empty_like(states) for states in (queries, keys, values)]
        for group, weights in zip_longest((*plan.stored, *plan.recomputed), stored):
            inputs = group.of_queries(queries, widths[0]), group.of_keys(keys), group.of_keys(values)
            if weights is None:
                weights = _weights(inputs[0], inputs[1], group.hidden, ctx.scores)
            into = (
                group.of_queries(grads_of_lines[0], widths[0]),
                group.of_keys(grads_of_lines[1]),
                group.of_keys(grads_of_lines[2]),
            )
            _gradients(inputs, weights, group.of_queries(grads, widths[1]), ctx.scores, into)
        grad_key, grad_value = (
            torch.zeros_like(own)
            .index_add_(0, plan.keys, grads_of_keys)
            .view(states.shape[1], heads, -1)
            .transpose(0, 1)
            for own, grads_of_keys, states in zip(lines[1:], grads_of_lines[1:], (key, value), strict=True)
        )
        return _spread(grads_of_lines[0], plan, query.shape[:2]), grad_key, grad_value, None, None


def _lines(states: Tensor, heads: int) -> Tensor:
    """``[tokens · heads, parts · width]`` from ``[parts · heads, tokens, width]``: a token's states under one key
    head."""
    return states.transpose(0, 1).reshape(states.shape[1] * heads, -1)


def _gathered(lines: Sequence[Tensor], plan: _Plan) -> list[Tensor]:
    indices = (plan.queries, plan.keys, plan.keys)
    return [states.index_select(0, at) for states, at in zip(lines, indices, strict=True)]


def _spread(lines: Tensor, plan: _Plan, shape: Sequence[int]) -> Tensor:
    heads, tokens = shape
    return lines.index_select(0, plan.indices).view(tokens, heads, -1).transpose(0, 1)


def _weights(query: Tensor, key: Tensor, hidden: Tensor, scores: Scores) -> Tensor:
    rows, queries, keys = hidden.shape
    shape = -1, rows, queries, query.shape[1] // queries, keys
    if scores.cap is not None:
        capped = _bounded(query, key, scores).mul_(scores.cap)
        capped.view(shape).add_(hidden[:, :, None])
        return torch.softmax(capped, dim=-1)
    plain = query.new_empty(*query.shape[:2], key.shape[1])
    plain.view(shape).copy_(hidden[:, :, None])
    return torch.softmax(plain.baddbmm_(query, key.transpose(1, 2), alpha=scores.scale), dim=-1)


def _bounded(query: Tensor, key: Tensor, scores: Scores) -> Tensor:
    assert scores.cap is not None, "only capped scores are bounded"
    return torch.bmm(query, key.transpose(1, 2)).mul_(scores.scale / scores.cap).tanh_()


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    weights: Tensor,
    grad: Tensor,
    scores: Scores,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients of softmax(scores) v for ``[matrices, queries or keys, width]``, given the softmax."""
    query, key, value = inputs
    torch.bmm(weights.transpose(1, 2), grad, out=into[2])
    grad_weights = torch.bmm(grad, value.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    if scores.cap is not None:  # d c·tanh(s / c) / ds = 1 − tanh²(s / c)
        grad_scores = grad_scores.mul_(_bounded(query, key, scores).square_().neg_().add_(1.0))
    into[0].baddbmm_(grad_scores, key, beta=0, alpha=scores.scale)
    into[1].baddbmm_(grad_scores.transpose(1, 2), query, beta=0, alpha=scores.scale)


def _long(query: Tensor, key: Tensor, value: Tensor, row: Row, hidden: Tensor | None, scale: float) -> Tensor:
    keys, values = (torch.cat([states[:, start:end] for start, end in row.keys], dim=1) for states in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query[None, :, slice(*row.own)],
        keys[None],
        values[None],
        attn_mask=hidden,
        is_causal=hidden is None,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, cap: float
) -> Tensor:
    """``[rows, tokens, heads, value width]``; scores and weights are rounded to the keys' dtype.

    Args:
        query: ``[rows, heads, tokens, width]``.
        key: ``[rows, key heads, columns, width]``.
        value: ``[rows, key heads, columns, value width]``.
        mask: ``[rows or 1, 1, tokens, columns]``, False or −∞ where a token does not see a column, else True or 0;
            without one, each token sees the columns up to its own. The result for a token that sees none, such as
            padding, is finite.
        scaling: 1/√width if None."""
    rows, heads, columns, width = key.shape
    tokens = query.shape[2]
    queries = query.to(key.dtype).reshape(rows, heads, -1, tokens, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = (queries @ key[:, :, None].transpose(-1, -2) * (scale / cap)).tanh() * cap
    if mask is None:
        mask = torch.ones(1, 1, tokens, columns, dtype=torch.bool, device=query.device).tril(columns - tokens)
    seen = mask if mask.dtype == torch.bool else mask == 0
    scores = scores.masked_fill(~seen[:, :, None], torch.finfo(scores.dtype).min)
    attended = torch.softmax(scores, dim=-1) @ value[:, :, None]
    return attended.flatten(1, 2).transpose(1, 2)


ORDER = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention takes the first kernel of ``ORDER`` that can serve a call. Outside CUDA this has no effect."""
    with sdpa_kernel(list(ORDER), set_priority=True):
        yield
