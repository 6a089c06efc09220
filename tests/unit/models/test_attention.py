"""Attention of many rows at once equals attention written as loops, whichever kernel computes it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import varlen

from alignment.models.forward import attention
from alignment.models.forward.attention import KeysValues, flat_attention
from alignment.models.forward.rows import FlatRows, behind, stream
from alignment.models.kernels import row_attention
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
    """As the definition says it, one query at a time: it sees the keys before its own, and its own; the last ones."""
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


def test_short_rows_share_a_product_and_long_ones_stand_alone() -> None:
    lengths = [90, 100, 30, 95, 28, 300, 33]
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    rows = tuple(Row((end - length, end), ((end - length, end),)) for length, end in zip(lengths, ends, strict=True))
    plan = row_attention._plan(rows, 3, torch.bfloat16, torch.device("cpu"))
    assert sorted(group.hidden.shape[1] for group in plan.stored) == [48, 112], "padded to a multiple of 16"
    assert sorted(group.matrices for group in plan.stored) == [9, 9]
    assert [row.queries for row, _ in plan.long] == [300]


def test_no_product_has_more_scores_than_it_may() -> None:
    rows = tuple(Row((200 * n, 200 * n + 200), ((200 * n, 200 * n + 200),)) for n in range(20))
    plan = row_attention._plan(rows, 1, torch.bfloat16, torch.device("cpu"))
    assert {group.hidden.shape for group in plan.stored} == {(1, 128, 128), (1, 80, 208)}, "spans of 128 and 72 queries"
    assert sum(group.matrices for group in plan.stored) == 2 * 20
    assert all(group.matrices * group.hidden[0].numel() <= row_attention.SCORES for group in plan.stored)


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
    """What torch's documentation says of the kernel, token by token; queries end where their keys end."""
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16, "width": 256, "value": 256, "capability": (12, 0)}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"width": 12, "value": 12}, False),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.4"}, False),
    ],
)
def test_the_kernel_is_asked_for_what_it_has(
    changes: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits that FlashAttention 2 documents."""
    usual = {"width": 64, "value": 64, "dtype": torch.bfloat16, "device": "cuda", "capability": (8, 0), "hip": None}
    machine = usual | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(torch.version, "hip", machine["hip"])
    device = torch.device(machine["device"])
    query, value = (
        SimpleNamespace(shape=(1, HEADS, 7, machine[name]), dtype=machine["dtype"], device=device)
        for name in ("width", "value")
    )
    assert attention._has_kernel(query, value) is expected  # type: ignore[arg-type]


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


@pytest.mark.parametrize("virtual", [0, 3])
def test_the_kernel_gets_what_was_read_earlier(virtual: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts behind prompts of another stream, with a prefix before both or none."""
    kernel = mock.Mock(side_effect=_slow_varlen)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    start = list(range(10, 30))
    read = stream([[*start, 5], [*start, 6, 7], [8, 9]], torch.device("cpu"))
    rows = behind(read, [1, 0, 2, 2], [[4, 4], [3], [5, 6, 7], [2]])
    earlier = KeysValues()
    layer: Any = torch.nn.Identity()
    layer.layer_idx = 0
    query, key, value = _states(read, "cpu", torch.float32)
    prefix = torch.randn(2, KEY_HEADS, virtual, key.shape[-1]) if virtual else None
    flat_attention(layer, query, key, value, None, segments=read.segments, keys_values=earlier)
    query, key, value = _states(rows, "cpu", torch.float32)
    options: dict[str, Any] = {"segments": rows.segments, "earlier": earlier}
    expected, _ = flat_attention(layer, query, key, value, None, **options, prefix=prefix)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    attended, _ = flat_attention(layer, query, key, value, None, **options, prefix=prefix)
    assert kernel.called
    assert relative(attended, expected) < 1e-5


@pytest.mark.parametrize("name", ROWS)
def test_the_kernel_gets_a_prefix_in_front_of_every_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", _slow_varlen)
    rows = _rows(name, "cpu")
    query, key, value = _states(rows, "cpu", torch.float32)
    prefix = torch.randn(2, KEY_HEADS, 3, key.shape[-1])
    layer = torch.nn.Identity()
    layer.layer_idx = 0
    expected, _ = flat_attention(layer, query, key, value, None, segments=rows.segments, prefix=prefix)
    keys, values = torch.cat([prefix[0], key[0]], dim=1), torch.cat([prefix[1], value[0]], dim=1)
    attended = attention._varlen(query[0], keys, values, rows.segments, WIDTH**-0.5, attention._Ahead(prefix=3))
    assert relative(attended, expected[0]) < 1e-5
    without, _ = flat_attention(layer, query, key, value, None, segments=rows.segments)
    assert relative(without, expected) > 1e-2


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
