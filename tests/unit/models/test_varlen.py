"""The variable-length kernel is told the right rows. Its arithmetic is PyTorch's; on a GPU it is run for real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import varlen

from alignment.models.forward import attention
from alignment.models.forward.attention import KeysValues, flat_attention
from alignment.models.forward.rows import FlatRows, behind, stream
from tests.unit.models.conftest import ROWS, relative

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


class _Shown:
    """As much of a state on a GPU as the choice of the kernel looks at."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        self.shape = (1, HEADS, 7, width)
        self.dtype = dtype
        self.device = torch.device(device)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16, "width": 256, "value": 256, "capability": (12, 0)}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"width": 64, "value": 32}, False),
        ({"width": 12, "value": 12}, False),
        ({"width": 264, "value": 264}, False),
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
    query, value = (_Shown(machine[name], machine["dtype"], machine["device"]) for name in ("width", "value"))
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


def test_values_may_have_another_width_than_keys() -> None:
    rows = _rows("pairs of one prompt", "cpu")
    query, key, _ = _states(rows, "cpu", torch.float32)
    value = torch.randn(1, KEY_HEADS, len(rows.input_ids), 5).requires_grad_()
    attended, _ = flat_attention(torch.nn.Identity(), query, key, value, None, segments=rows.segments)
    attended.square().sum().backward()
    with_gradients = [attended, query.grad, key.grad, value.grad]
    for state in (query, key, value):
        state.grad = None
    expected = []
    for row, segment in enumerate(rows.segments):
        indices = rows.index[row][rows.is_real[row]]
        states = [state[:, :, indices].repeat_interleave(HEADS // state.shape[1], 1) for state in (query, key, value)]
        later = torch.ones(len(indices), len(indices)).triu(1).bool()
        scores = (states[0] @ states[1].transpose(-1, -2) * WIDTH**-0.5).masked_fill(later, float("-inf"))
        shared = len(indices) - (segment.own[1] - segment.own[0])
        expected.append((scores.softmax(-1) @ states[2])[0, :, shared:])
    whole = torch.cat(expected, dim=1).transpose(0, 1)[None]
    whole.square().sum().backward()
    for tensor, other in zip(with_gradients, [whole, query.grad, key.grad, value.grad], strict=True):
        assert relative(tensor, other) < 1e-5


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
