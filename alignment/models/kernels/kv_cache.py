"""The cache of a decoding batch: keys and values, written in place. transformers' ``DynamicCache`` copies everything at
every step, and again whenever a row finishes. Here columns are allocated ahead, and rows move only when the caller
asks. The attention of one new token per row reads the cache in place, once for all query heads that share a key head
(Ainslie et al. 2023, grouped-query attention)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignment.core.errors import ModelError
from alignment.costs.recorder import CACHE, memory_for
from alignment.models.assembly.modules import products_dtype
from alignment.models.forward.attention import KeysValues
from alignment.models.kernels.row_attention import capped_attention

ATTENTION = "decoding"
ROOM = 64
"""Columns allocated ahead. With more of them, more empty columns would enter products; with fewer, the cache would grow
more often, and writing to new memory is slow."""


# ---- keys and values --------------------------------------------------------------------------------------------


class RowsLayer(CacheLayerMixin):
    """``[rows, key heads, columns, width]`` keys and values of one layer; the first ``length`` columns are filled.
    ``room`` columns are allocated ahead. With ``shows_room``, ``update`` returns them too, because the model's mask
    hides them, like columns outside a sliding window. Keys and values have the dtype of the products, which is
    autocast's if it is enabled."""

    is_sliding = False

    def __init__(self, room: int, *, shows_room: bool) -> None:
        super().__init__()
        self.room = room
        self.shows_room = shows_room
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Starts without columns, filled or allocated."""
        dtype = products_dtype(key_states)
        self.keys, self.values = key_states[:, :, :0].to(dtype), value_states[:, :, :0].to(dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new columns; returns all that are filled, or with ``shows_room`` all that are allocated."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        start, returned = self.length, self._returned_after(new)
        self.skip(new)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, :returned], self.values[:, :, :returned]

    def skip(self, new: int) -> None:
        """Counts so many new columns as filled."""
        columns = self._columns_after(new)
        self.length += new
        if columns > self.keys.shape[2]:
            self.keys, self.values = _widened(self.keys, columns), _widened(self.values, columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that the next update returns, and the index of the first of them."""
        return self._returned_after(query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        """−1, which means no limit."""
        return -1

    def write(self, keys: Tensor, values: Tensor, *, at: Tensor, rows: int, length: int) -> None:
        """Writes ``[some rows, key heads, columns, width]`` as the rows ``at``, right-aligned at column ``length``.
        ``rows`` is the number of rows in the whole cache."""
        if not self.is_initialized:
            with memory_for(CACHE):
                self.keys, self.values = (
                    states.new_zeros(rows, states.shape[1], length + self.room, states.shape[3])
                    for states in (keys, values)
                )
            self.length, self.is_initialized = length, True
        columns = slice(length - keys.shape[2], length)
        self.keys[:, :, columns].index_copy_(0, at, keys)
        self.values[:, :, columns].index_copy_(0, at, values)

    def drop(self, columns: int, *, after: int) -> None:
        """Removes so many columns behind the first ``after``; what follows moves up within the memory."""
        self.length -= columns
        for start in range(after, self.length, columns):  # blocks that do not overlap with what they are copied from
            end = min(start + columns, self.length)
            for states in (self.keys, self.values):
                states[:, :, start:end] = states[:, :, start + columns : end + columns]

    def select(self, rows: Tensor) -> None:
        # It reuses memory, because writing to new memory is slow.
        self.keys, self.values = (states[: len(rows)].copy_(states[rows]) for states in (self.keys, self.values))

    def _columns_after(self, new: int) -> int:
        allocated = self.keys.shape[2] if self.is_initialized else 0
        needed = self.length + new
        return allocated if needed <= allocated else needed + self.room

    def _returned_after(self, new: int) -> int:
        return self._columns_after(new) if self.shows_room else self.length + new


class RowsCache(Cache):
    """A ``RowsLayer`` for every layer of a model that has its own keys and values. Raises ModelError: a layer caches
    something else, such as the state of a recurrence."""

    def __init__(self, config: PreTrainedConfig, *, room: int, shows_room: bool = True) -> None:
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[_layer_like(layer, room, shows_room=shows_room) for layer in layers])

    def write(self, source: RowsCache, rows_of_source: Tensor, *, at: Tensor, rows: int, length: int) -> None:
        """Writes the rows ``rows_of_source`` of another cache as the rows ``at [some rows]``. This cache has ``rows``
        rows, and ``length`` filled columns. Rows are right-aligned. A row of the source may be written several
        times."""
        for layer, other in zip(self.layers, source.layers, strict=True):
            if isinstance(layer, RowsLayer) and other.is_initialized:
                keys, values = (states[rows_of_source, :, : other.length] for states in (other.keys, other.values))
                layer.write(keys, values, at=at, rows=rows, length=length)

    def write_stream(self, keys_values: KeysValues, indices: Tensor, *, at: Tensor, rows: int, length: int) -> None:
        """Like ``write``, from a stream: ``indices [some rows, columns]`` are the indices of each column in it."""
        for number, (keys, values) in keys_values.layers.items():
            own = (states[:, indices].transpose(0, 1) for states in (keys, values))
            self.layers[number].write(*own, at=at, rows=rows, length=length)

    def put_in_front(self, prefix: Tensor) -> None:
        """Writes ``[2 · layers, key heads, tokens, width]`` keys and values into every row's first columns."""
        for number, layer in enumerate(self.layers):
            layer.keys[:, :, : prefix.shape[2]] = prefix[2 * number]
            layer.values[:, :, : prefix.shape[2]] = prefix[2 * number + 1]

    def drop(self, columns: int, *, after: int) -> None:
        """Removes so many columns of every row, behind its first ``after``."""
        for layer in self.layers:
            if isinstance(layer, RowsLayer) and layer.is_initialized:
                layer.drop(columns, after=after)

    @property
    def free_columns(self) -> int:
        """Number of columns that are allocated and not filled."""
        layers = (layer for layer in self.layers if isinstance(layer, RowsLayer) and layer.is_initialized)
        return min((layer.keys.shape[2] - layer.length for layer in layers), default=0)

    def skip(self, new: int) -> None:
        """Counts so many new columns of every row as filled."""
        for layer in self.layers:
            if isinstance(layer, RowsLayer) and layer.is_initialized:
                layer.skip(new)

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, RowsLayer) and layer.is_initialized:
                layer.select(rows)


def _layer_like(layer: Any, room: int, *, shows_room: bool) -> Any:
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return RowsLayer(room, shows_room=shows_room)
    if isinstance(layer, DummyLayer):
        return layer
    raise ModelError(
        f"generation does not support layers that cache a {type(layer).__name__}",
        where="model.source",
        remedy="use a model whose layers have full or sliding-window attention",
    )


def _widened(old: Tensor, columns: int) -> Tensor:
    # Zeros, because a hidden column still enters a product with weight 0.
    with memory_for(CACHE):
        new = old.new_zeros(old.shape[0], old.shape[1], columns, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


# ---- attention --------------------------------------------------------------------------------------------------


def decoding_attention(
    module: Any,
    query: Tensor,  # [rows, heads, new tokens, width]
    key: Tensor,  # [rows, key heads, columns, width]
    value: Tensor,
    attention_mask: Tensor | None,  # as decoding_mask makes it, or some of its tokens
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    beginning: KeysValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``[rows, new tokens, heads, width]``; two products and a softmax on CPU with one new token per row. Scores and
    weights are rounded to the cache's dtype; sums are in float32. ``softcap`` bounds the scores. ``beginning`` holds
    the keys and values of tokens that every row sees before those of the cache. In other cases transformers' function
    is called. Raises ValueError: ``beginning`` is given, but scores are capped or more than one token per row is
    new."""
    is_one_step = query.shape[2] == 1 and query.device.type == "cpu"
    if beginning is not None and not (is_one_step and softcap is None):
        raise ValueError(f"{type(module).__name__} does not support rows that share a beginning")
    unusual = dropout or any(kwargs.get(name) is not None for name in ("position_bias", "s_aux"))
    if unusual or not (softcap is not None or is_one_step):
        if attention_mask is not None and attention_mask.is_floating_point() and query.device.type == "cpu":
            attention_mask = attention_mask == 0
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
        )
    if softcap is not None:
        return capped_attention(query, key, value, attention_mask, scaling=scaling, cap=softcap), None
    rows, heads, columns, width = key.shape
    queries = query.to(key.dtype).reshape(rows * heads, -1, width)  # those that share a key head are adjacent
    keys, values = key.reshape(rows * heads, columns, width), value.reshape(rows * heads, columns, -1)
    summand = queries.new_zeros(1) if attention_mask is None else _summand(attention_mask, heads, queries.dtype)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(summand, queries, keys.transpose(1, 2), alpha=scale)
    if beginning is None:
        attended = torch.bmm(torch.softmax(scores, dim=-1), values)
    else:
        attended = _attended_behind(*beginning.layers[module.layer_idx], queries, scores, values, scale)
    return attended.reshape(rows, 1, query.shape[1], -1), None


@functools.lru_cache(maxsize=2)  # all layers ask for the same, or those with a window and those without
def _summand(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:  # of a prompt whose last token alone enters the later layers, as in Gemma 4
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.to(dtype).expand(-1, heads, -1, -1).reshape(-1, 1, mask.shape[-1])


def _attended_behind(
    common_keys: Tensor,  # [key heads, tokens, width]
    common_values: Tensor,
    queries: Tensor,  # [rows · key heads, queries of a key head, width]
    own_scores: Tensor,  # [rows · key heads, queries of a key head, columns]
    own_values: Tensor,  # [rows · key heads, columns, width]
    scale: float,
) -> Tensor:
    """``[rows · key heads, queries of a key head, width]``: attention over common and own columns. The common ones are
    read once for the queries of all rows."""
    heads, tokens, width = common_keys.shape
    rows, group, columns = len(queries) // heads, *own_scores.shape[1:]
    of_heads = queries.view(rows, heads, group, width).transpose(0, 1).reshape(heads, rows * group, width)
    scores = torch.baddbmm(queries.new_zeros(1), of_heads, common_keys.transpose(1, 2), alpha=scale)
    of_rows = scores.view(heads, rows, group, tokens).transpose(0, 1)
    weights = torch.softmax(torch.cat([of_rows, own_scores.view(rows, heads, group, columns)], dim=-1), dim=-1)
    common_weights, own_weights = weights.split([tokens, columns], dim=-1)
    common = torch.bmm(common_weights.transpose(0, 1).reshape(heads, rows * group, tokens), common_values)
    own = torch.bmm(own_weights.reshape(rows * heads, group, columns), own_values).view(rows, heads, group, -1)
    return own + common.view(heads, rows, group, -1).transpose(0, 1)


def decoding_mask(*, q_length: int, device: torch.device | str = "cpu", **kwargs: Any) -> Tensor | None:
    """The mask of transformers' scaled-dot-product attention; additive (0 or −infinity) for one new token per row."""
    on_cpu, dtype = torch.device(device).type == "cpu", torch.float32
    if not on_cpu:
        # Checking whether any column is hidden would wait for the device at every step.
        kwargs["allow_is_causal_skip"] = False
        # Kernels take the dtype of the queries; each layer would convert another one.
        dtype = products_dtype(torch.empty(0, dtype=kwargs["dtype"], device=device))
    seen = sdpa_mask(q_length=q_length, device=device, **kwargs)
    if seen is None or q_length != 1:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


AttentionInterface.register(ATTENTION, decoding_attention)
AttentionMaskInterface.register(ATTENTION, decoding_mask)
