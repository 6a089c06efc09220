"""Kernels of the device: variable-length attention (FlashAttention 2), and those of bitsandbytes for four bits.
Attention is a loop over rows in float32, which refuses what the kernel refuses: other dtypes, head widths, offsets,
devices. Those of bitsandbytes are the CPU's, because its binaries for CUDA need a driver; what they would refuse by
shape or dtype, the CPU's refuse or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.simulated_device.events import FAULT, count, quiet

_LIBRARY = torch.library.Library("aten", "IMPL")
_WIDEST = 256
_ALIGNED = 8
"""Elements of two bytes in 16 bytes, to which the kernel's rows have to be aligned."""


def add_attention() -> None:
    _LIBRARY.impl("_flash_attention_forward", _forward, "CUDA")
    _LIBRARY.impl("_flash_attention_backward", _backward, "CUDA")


def _forward(
    query: Tensor,  # [tokens, heads, width]
    key: Tensor,
    value: Tensor,
    starts: Tensor,  # [rows + 1]
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_right: int | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    spans = _checked(query, key, value, starts, key_starts, longest, longest_key)
    causal = is_causal or window_size_right == 0
    with quiet(), torch.no_grad():
        own_query, own_key, own_value = (states.detach().cpu().float() for states in (query, key, value))
        attended = torch.zeros_like(own_query)
        log_sums = torch.zeros(query.shape[1], query.shape[0])
        for queries, keys in spans:
            scores, wide_value = _scores(own_query[queries], own_key[keys], own_value[keys], causal, scale)
            log_sums[:, queries] = scores.logsumexp(-1)
            attended[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), wide_value)
        device = query.device
        unused = [torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)]
        return tuple(held.to(device) for held in (attended.to(query.dtype), log_sums, *unused))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    log_sums: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    is_causal: bool,
    *_: Any,
    scale: float | None = None,
    window_size_right: int | None = None,
    **__: Any,
) -> tuple[Tensor, ...]:
    spans = _checked(query, key, value, starts, key_starts, longest, longest_key)
    assert grad.dtype == query.dtype, f"the kernel takes a gradient of {query.dtype}, not of {grad.dtype}"
    causal = is_causal or window_size_right == 0
    with quiet(), torch.no_grad():
        own_grad = grad.cpu().float()
        states = [held.detach().cpu().float() for held in (query, key, value)]
        gradients = [torch.zeros_like(held) for held in states]
        for queries, keys in spans:
            row = [held[span] for held, span in zip(states, (queries, keys, keys), strict=True)]
            parts = _row_gradients(own_grad[queries], *row, causal, scale)
            for whole, span, part in zip(gradients, (queries, keys, keys), parts, strict=True):
                whole[span] = part
        return tuple(whole.to(query.device, query.dtype) for whole in gradients)


def _row_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    group, factor = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
    scores, wide_value = _scores(query, key, value, causal, scale)
    shares = scores.softmax(-1).nan_to_num()
    of_shares = torch.einsum("qhd,khd->hqk", grad, wide_value)
    of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * factor
    of_key = torch.einsum("hqk,qhd->khd", of_scores, query)
    of_value = torch.einsum("hqk,qhd->khd", shares, grad)
    heads = (key.shape[1], group)
    return (
        torch.einsum("hqk,khd->qhd", of_scores, key.repeat_interleave(group, 1)),
        of_key.unflatten(1, heads).sum(2),
        of_value.unflatten(1, heads).sum(2),
    )


def _scores(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:  # queries are aligned with the end of their keys
        later = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool).triu(key.shape[0] - query.shape[0] + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores, value


def _checked(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_key: int
) -> list[tuple[slice, slice]]:
    half = (torch.float16, torch.bfloat16)
    assert {held.device for held in (query, key, value, starts, key_starts)} == {query.device}, "tensors of one device"
    assert query.is_cuda, "tensors of CUDA"
    assert query.dtype in half, f"half precision, not {query.dtype}"
    assert query.dtype == key.dtype == value.dtype, f"{query.dtype} {key.dtype} {value.dtype}"
    assert starts.dtype == key_starts.dtype == torch.int32, "offsets are int32"
    assert starts.is_contiguous(), "offsets are contiguous"
    assert key_starts.is_contiguous(), "offsets are contiguous"
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1, "the last dimension is contiguous"
    width = query.shape[-1]
    assert width == key.shape[-1] == value.shape[-1] <= _WIDEST, f"a head width of at most {_WIDEST}, not {width}"
    assert width % _ALIGNED == 0, f"a head width of a multiple of {_ALIGNED}, not {width}"
    with quiet():
        bounds, key_bounds = starts.tolist(), key_starts.tolist()
    assert (bounds[-1], key_bounds[-1]) == (query.shape[0], key.shape[0]), "offsets end with the last token"
    assert key.shape[0] == value.shape[0]
    assert (longest, longest_key) == (_longest(bounds), _longest(key_bounds)), "the longest rows"
    for name, held in (("queries", query), ("keys", key), ("values", value)):
        if held.storage_offset() % _ALIGNED or any(stride % _ALIGNED for stride in held.stride()[:-1]):
            count(FAULT, f"flash attention: {name} are not aligned to 16 bytes: {held.stride()}")
    return list(zip(_slices(bounds), _slices(key_bounds), strict=True))


def _slices(bounds: Sequence[int]) -> Iterator[slice]:
    return (slice(first, last) for first, last in itertools.pairwise(bounds))


def _longest(bounds: Sequence[int]) -> int:
    return max(last - first for first, last in itertools.pairwise(bounds))


_FOUR_BITS = ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise")


def add_four_bits() -> None:
    for name in _FOUR_BITS:
        operator = getattr(torch.ops.bitsandbytes, name).default
        torch.library.impl(f"bitsandbytes::{name}", "cuda", func=_on_host(operator))


def _on_host(operator: Any) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        devices = {held.device for held in arguments if isinstance(held, Tensor)}
        (device,) = devices  # of all tensors
        with quiet():
            made = operator(*[held.cpu() if isinstance(held, Tensor) else held for held in arguments])
            if isinstance(made, Tensor):
                return made.to(device)
            return tuple(part.to(device) for part in made)

    return kernel
