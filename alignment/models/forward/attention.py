"""Attention inside the rows of a stream, as a function that transformers' models call (AttentionInterface). On CUDA all
rows are one call of the variable-length kernel; elsewhere, and with capped scores, they are some batched products
(alignment/models/kernels/row_attention.py). A shared beginning is gathered before the row's own keys and values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignment.costs.recorder import is_on_cpu
from alignment.models.assembly.modules import products_dtype
from alignment.models.forward.rows import Range, Segment, on_device
from alignment.models.kernels.row_attention import Row, Scores, attend, capped_attention

ATTENTION = "flat"
SLIDING = "sliding_attention"
"""What transformers calls a layer with a sliding window."""
_WIDEST_HEAD = 256
_AMPERE = (8, 0)


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Keys and values of a stream, each ``[key heads, tokens, head width]``, per layer number."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def cut(self, tokens: int) -> None:
        """Keeps only the first ``tokens`` tokens."""
        for number, (keys, values) in self.layers.items():
            self.layers[number] = keys[:, :tokens], values[:, :tokens]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Numbers of keys before a stream's own: ``prefix`` keys, which every query sees, then ``read`` keys of an earlier
    stream."""

    prefix: int = 0
    read: int = 0

    def shifted(self, span: Range) -> Range:
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Sequence[Segment] | None = None,
    prefix: Tensor | None = None,  # [2 · layers, key heads, virtual tokens, head width]
    keys_values: KeysValues | None = None,
    earlier: KeysValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``[1, tokens, heads, value width]``; without ``segments`` the batch is padded and the standard function computes
    it. ``keys_values`` receives the layer's keys and values; ``earlier`` holds those of a stream before this one. With
    a ``sliding_window`` a token sees that many tokens up to itself, and ``softcap`` bounds the scores. Raises
    ValueError: the model needs a feature that this function lacks: dropout on attention weights, a bias or a learned
    mask, sinks; or its window is not the one in its configuration."""
    if segments is None and softcap is not None and not dropout:
        return capped_attention(query, key, value, attention_mask, scaling=scaling, cap=softcap), None
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
        )
    unusual = [name for name in ("position_bias", "s_aux") if kwargs.get(name) is not None]
    unusual += ["another window than its configuration's"] * (sliding_window != window_of_layer(module))
    unusual += ["dropout"] * bool(dropout)
    unusual += ["attention_mask"] * (attention_mask is not None and attention_mask.numel() != 1)
    if unusual:
        raise ValueError(f"{type(module).__name__} asks attention for {', '.join(unusual)}, which a flat stream lacks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary positions may leave queries and keys in float32 while autocast has values in bfloat16.
    query, key, value = (states.to(products_dtype(value)) for states in (query, key, value))
    keys, values, ahead = _with_earlier(
        module, key[0], value[0], prefix=prefix, keys_values=keys_values, earlier=earlier
    )
    if softcap is None and _has_kernel(query, value):
        return _varlen(query[0], keys, values, segments, scale, ahead, sliding_window)[None], None
    scores = Scores(scale=scale, window=sliding_window, cap=softcap)
    attended = attend(query[0], keys, values, _rows(tuple(segments), ahead), scores)
    return attended.transpose(0, 1)[None], None


def window_of_layer(module: Any) -> int | None:
    """The sliding window of an attention layer, as the model's configuration has it."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[module.layer_idx] != SLIDING:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _with_earlier(
    module: Any,
    keys: Tensor,
    values: Tensor,
    *,
    prefix: Tensor | None,
    keys_values: KeysValues | None,
    earlier: KeysValues | None,
) -> tuple[Tensor, Tensor, _Ahead]:
    ahead = _Ahead()
    if keys_values is not None:
        keys_values.layers[module.layer_idx] = keys.contiguous(), values.contiguous()  # not as views of larger products
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
    """Whether CUDA's variable-length kernel supports these; batched products compute the rest. It is FlashAttention 2
    (Dao 2023): half precision, values as wide as keys, widths that are multiples of 8 up to 256, on NVIDIA's GPUs from
    Ampere on. ROCm has another implementation, which is untested."""
    if is_on_cpu(query) or query.device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return False
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= _WIDEST_HEAD
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cpu":  # it is planned for a GPU
        return fits and half
    return fits and half and torch.cuda.get_device_capability(query.device) >= _AMPERE


@functools.lru_cache(maxsize=4)  # all layers ask for the same ones
def _rows(segments: tuple[Segment, ...], ahead: _Ahead) -> tuple[Row, ...]:
    first = ((0, ahead.prefix),) if ahead.prefix else ()
    return tuple(
        Row(segment.own, (*first, *map(ahead.shifted, segment.keys)))
        for segment in segments
        if segment.own[1] > segment.own[0]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _KernelArguments:
    """Arguments of the variable-length kernel: indices of ``keys`` unless they are in the order of the stream, ``[rows
    + 1]`` offsets of queries and keys, and the longest row's numbers of queries and keys."""

    keys: Tensor | None
    starts: Tensor
    key_starts: Tensor
    longest: int
    longest_keys: int


@functools.lru_cache(maxsize=4)  # all layers ask for the same ones
def _kernel_arguments(segments: tuple[Segment, ...], ahead: _Ahead, device: torch.device) -> _KernelArguments:
    rows = _rows(segments, ahead)
    own, whole = [row.queries for row in rows], [row.earlier + row.queries for row in rows]
    in_order = ahead == _Ahead() and not any(segment.before for segment in segments)
    return _KernelArguments(
        keys=None
        if in_order
        else on_device(torch.cat([torch.arange(*span) for row in rows for span in row.keys]), device),
        starts=_offsets(own, device),
        key_starts=_offsets(whole, device),
        longest=max(own),
        longest_keys=max(whole),
    )


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return on_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scale: float,
    ahead: _Ahead,
    window: int | None = None,
) -> Tensor:
    """``[tokens, heads, width]`` by one kernel call on CUDA; queries are aligned with the end of their keys."""
    from torch.nn.attention.varlen import varlen_attn

    arguments = _kernel_arguments(tuple(segments), ahead, query.device)
    if arguments.keys is not None:
        key, value = key.index_select(1, arguments.keys), value.index_select(1, arguments.keys)
    attended = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        arguments.starts,
        arguments.key_starts,
        arguments.longest,
        arguments.longest_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )
    assert isinstance(attended, Tensor)  # the log-sum-exp comes with it only on request
    return attended


AttentionInterface.register(ATTENTION, flat_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
