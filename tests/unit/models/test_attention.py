"""Attention of many rows, and of one new token behind a cache, equals attention written as loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import LlamaConfig

from alignment.core.errors import ModelError
from alignment.models.forward import attention
from alignment.models.forward.attention import KeysValues, flat_attention
from alignment.models.forward.rows import FlatRows, stream
from alignment.models.kernels import row_attention
from alignment.models.kernels.kv_cache import RowsCache, decoding_attention
from alignment.models.kernels.row_attention import Row, Scores, attend
from tests.unit.models.conftest import ROWS, relative

SHAPES = {
    "rows alone": (Row((0, 3), ((0, 3),)), Row((3, 4), ((3, 4),)), Row((4, 10), ((4, 10),))),
    "a shared beginning": (
        Row((0, 5), ((0, 5),)),
        Row((5, 7), ((0, 3), (5, 7))),
        Row((7, 10), ((0, 2), (5, 6), (7, 10))),
    ),
    "keys in front of the stream": (Row((0, 2), ((0, 4), (6, 8))), Row((2, 10), ((1, 3), (8, 16)))),
}
PLAIN = Scores(scale=0.3)
HOW = {
    "plain": PLAIN,
    "a window of 3": Scores(scale=0.3, window=3),
    "capped": Scores(scale=0.9, cap=0.8),
    "a window and capped": Scores(scale=0.9, window=2, cap=0.8),
}


def _by_loops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: tuple[Row, ...], how: Scores
) -> torch.Tensor:
    parts = query.shape[0] // key.shape[0]
    out = []
    for head in range(query.shape[0]):
        attended = {}
        for row in rows:
            indices = [index for start, end in row.keys for index in range(start, end)]
            for number, token in enumerate(range(*row.own)):
                seen = indices[: len(indices) - row.queries + number + 1]
                seen = seen if how.window is None else seen[-how.window :]
                scores = torch.stack([query[head, token] @ key[head // parts, index] for index in seen]) * how.scale
                scores = scores if how.cap is None else how.cap * torch.tanh(scores / how.cap)
                attended[token] = torch.softmax(scores, 0) @ value[head // parts, seen]
        out.append(torch.stack([attended[token] for token in sorted(attended)]))
    return torch.stack(out)


LIMITS: list[dict[str, int]] = [{}, {"QUERIES": 4, "SPAN": 3, "SCORES": 0}, {"CALL": 0}, {"CALL": 10**9}]


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_values_and_gradients_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, how: Scores, rows: tuple[Row, ...], heads: tuple[int, int]
) -> None:
    rng = torch.Generator().manual_seed(0)
    keys = max(end for row in rows for _, end in row.keys)
    shapes = (heads[0], 10, 8), (heads[1], keys, 8), (heads[1], keys, 5)
    inputs = [torch.randn(*shape, generator=rng).requires_grad_() for shape in shapes]
    exact_inputs = [states.detach().double().requires_grad_() for states in inputs]
    upstream = torch.randn(heads[0], 10, 5, generator=rng)
    expected = _by_loops(*exact_inputs, rows, how)  # type: ignore[call-arg]
    exact_gradients = torch.autograd.grad(expected, exact_inputs, upstream.double())
    for limits in LIMITS:
        with monkeypatch.context() as changed:
            for name, number in limits.items():
                changed.setattr(row_attention, name, number)
            row_attention._plan.cache_clear()
            attended = attend(*inputs, rows, how)  # type: ignore[call-arg]
            gradients = torch.autograd.grad(attended, inputs, upstream)
            row_attention._plan.cache_clear()
        for part, exact in zip((attended, *gradients), (expected, *exact_gradients), strict=True):
            torch.testing.assert_close(part, exact.float(), atol=1e-5, rtol=1e-5, msg=f"differs with {limits}")


def test_what_is_no_number_stays_in_its_row() -> None:
    states = [torch.ones(2, 10, 8) for _ in range(3)]
    states[1][:, 0] = states[2][:, 0] = math.nan
    attended = attend(*states, (Row((0, 3), ((0, 3),)), Row((3, 10), ((3, 10),))), PLAIN)  # type: ignore[call-arg]
    assert attended[:, :3].isnan().all()
    torch.testing.assert_close(attended[:, 3:], torch.ones(2, 7, 8))


HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def _states(rows: FlatRows, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    tokens = len(rows.input_ids)
    shapes = [(1, heads, tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return tuple(torch.randn(shape, generator=rng).to(device, dtype).requires_grad_() for shape in shapes)


def _slow_varlen(
    query: torch.Tensor,  # [tokens, heads, width]
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    *_: int,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    left, right = window_size
    assert right == 0
    assert enable_gqa
    assert starts.dtype == key_starts.dtype == torch.int32
    out = torch.empty_like(query)
    bounds = [offsets.tolist() for offsets in (starts[:-1], starts[1:], key_starts[:-1], key_starts[1:])]
    for start, end, key_start, key_end in zip(*bounds, strict=True):
        for token in range(start, end):
            own = key_end - (end - 1 - token)  # one past the query's own key
            seen = slice(key_start if left < 0 else max(key_start, own - 1 - left), own)
            for head in range(query.shape[1]):
                key_head = head * key.shape[1] // query.shape[1]
                weights = (key[seen, key_head] @ query[token, head] * scale).softmax(-1)
                out[token, head] = weights @ value[seen, key_head]
    return out


def _rows(name: str, device: str) -> FlatRows:
    return stream([[*prompt, *answer] for prompt, answer in ROWS[name]], torch.device(device))


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("name", ROWS)
def test_the_kernel_gets_the_rows_and_their_shared_beginnings(
    name: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = mock.Mock(side_effect=_slow_varlen)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    rows = _rows(name, "cpu")
    query, key, value = _states(rows, "cpu", torch.float32)
    layer: Any = torch.nn.Identity()
    layer.config = SimpleNamespace(sliding_window=window)
    asked: dict[str, Any] = {"segments": rows.segments, "sliding_window": window}
    expected, _ = flat_attention(layer, query, key, value, None, **asked)
    assert not kernel.called
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    attended, _ = flat_attention(layer, query, key, value, None, **asked)
    assert kernel.called
    assert relative(attended, expected) < 1e-5


@pytest.mark.parametrize("asked", [{"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_a_flat_stream_lacks_is_refused(asked: dict[str, Any]) -> None:
    rows = _rows("ragged", "cpu")
    states = _states(rows, "cpu", torch.float32)
    with pytest.raises(ValueError, match=f"asks attention for {next(iter(asked))}"):
        flat_attention(torch.nn.Identity(), *states, None, segments=rows.segments, **asked)
    with pytest.raises(ValueError, match="asks attention for attention_mask"):
        flat_attention(torch.nn.Identity(), *states, torch.zeros(1, 1, 8, 8), segments=rows.segments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ROWS)
def test_on_a_gpu_attention_and_its_gradients_are_those_of_the_cpu(name: str) -> None:
    passes: list[Any] = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        rows = _rows(name, device)
        states = _states(rows, device, dtype)
        out, _ = flat_attention(torch.nn.Identity(), *states, None, segments=rows.segments)
        out.float().square().sum().backward()
        passes.append([out.float().cpu(), *(state.grad.float().cpu() for state in states)])
    for on_gpu, on_cpu in zip(*passes, strict=True):
        assert relative(on_gpu, on_cpu) < 0.02


CACHE_HEADS, CACHE_WIDTH = 2, 8


def _cache_states(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, CACHE_HEADS, columns, CACHE_WIDTH, generator=rng)
    return keys, values


def test_a_layer_with_another_kind_of_state_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ModelError, match="does not support layers that cache a LinearAttentionLayer"):
        RowsCache(config, room=0)


def _decoded(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    score: Callable[..., torch.Tensor],
) -> torch.Tensor:
    attended = torch.empty(query.shape[0], query.shape[2], query.shape[1], CACHE_WIDTH, dtype=torch.float64)
    for row, head, token in itertools.product(*map(range, query.shape[:3])):
        visible = seen[row, 0, token]
        k, v = (states[row, head * CACHE_HEADS // query.shape[1]][visible].double() for states in (keys, values))
        attended[row, token, head] = torch.softmax(score(k @ query[row, head, token].double()), 0) @ v
    return attended


TYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


@TYPES
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("mask", ["summand", "boolean"])
def test_attention_of_one_new_token_equals_the_formula_in_float64(
    mask: str, groups: int, scaling: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Masks are boolean in the later layers of Gemma 4, which compute only the last token of a prompt."""
    rows, columns = 3, 7
    keys, values = (states.to(dtype) for states in _cache_states(rows, columns, seed=0))
    query = torch.randn(rows, CACHE_HEADS * groups, 1, CACHE_WIDTH, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    seen = torch.ones(rows, 1, 1, columns, dtype=torch.bool)
    seen[0, ..., :2] = False
    seen[1, ..., -3:] = False
    hidden = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if mask == "summand" else seen
    attended, _ = decoding_attention(nn.Module(), query, keys, values, hidden, scaling=scaling)
    factor = CACHE_WIDTH**-0.5 if scaling is None else scaling
    expected = _decoded(query, keys, values, seen, lambda scores: scores * factor)
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("changed", [{"softcap": 1.0}, {"query": torch.zeros(1, CACHE_HEADS, 2, CACHE_WIDTH)}])
def test_attention_that_cannot_see_a_common_beginning_refuses_it(changed: dict[str, Any]) -> None:
    keys, values = _cache_states(1, 7, seed=0)
    arguments = {"query": torch.zeros(1, CACHE_HEADS, 1, CACHE_WIDTH), "beginning": KeysValues(), **changed}
    with pytest.raises(ValueError, match="Module does not support rows that share a beginning"):
        decoding_attention(nn.Module(), key=keys, value=values, attention_mask=None, **arguments)
