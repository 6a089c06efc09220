"""The cache and attention of decoding: what is written stays, hidden columns never count, nothing is left behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Gemma4Config, LlamaConfig

from alignment.core.errors import ModelError
from alignment.models.forward.attention import KeysValues
from alignment.models.forward.decoding import decoding, may_see_room
from alignment.models.kernels.kv_cache import ATTENTION, RowsCache, decoding_attention
from tests.tiny import tiny_config, tiny_model
from tests.unit.models.conftest import SIZES, random_model

HEADS, WIDTH = 2, 8


def _states(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, HEADS, columns, WIDTH, generator=rng)
    return keys, values


@pytest.mark.parametrize("shows_room", [True, False])
@pytest.mark.parametrize("room", [0, 1, 3, 64])
def test_columns_are_kept_in_order_whatever_the_room(room: int, shows_room: bool) -> None:
    rows_cache = RowsCache(tiny_config("llama"), room=room, shows_room=shows_room)
    dynamic_cache = DynamicCache(config=tiny_config("llama"))
    for step, new in enumerate([5, 1, 1, 1, 2, 1]):
        assert rows_cache.get_seq_length() == dynamic_cache.get_seq_length()
        for layer in range(2):
            states = _states(3, new, seed=10 * step + layer)
            expected_columns, _ = rows_cache.get_mask_sizes(new, layer)
            updated, expected = rows_cache.update(*states, layer), dynamic_cache.update(*states, layer)
            for tensor, reference in zip(updated, expected, strict=True):
                assert tensor.shape[2] == expected_columns >= reference.shape[2]
                assert tensor.shape[2] - reference.shape[2] <= (room if shows_room else 0)
                assert torch.equal(tensor[:, :, : reference.shape[2]], reference)
                assert not tensor[:, :, reference.shape[2] :].any()


def test_placed_rows_end_at_the_same_column_and_may_repeat() -> None:
    whole, part = (RowsCache(tiny_config("llama"), room=room) for room in (2, 0))
    for layer in range(2):
        part.update(*_states(2, 3, seed=layer), layer)
    whole.write(part, torch.tensor([1, 1, 0]), at=torch.tensor([1, 2, 3]), rows=4, length=5)
    assert whole.get_seq_length() == 5
    keys = whole.layers[1].keys
    source = part.layers[1].keys
    assert keys.shape == (4, HEADS, 7, WIDTH)
    for row, origin in ((1, 1), (2, 1), (3, 0)):
        assert torch.equal(keys[row, :, 2:5], source[origin])
    assert not keys[0].any()
    assert not keys[:, :, :2].any()
    assert not keys[:, :, 5:].any()


@pytest.mark.parametrize("shows_room", [True, False])
@pytest.mark.parametrize(("columns", "after"), [(1, 0), (2, 1), (3, 2), (6, 0)])
def test_dropped_columns_are_gone_and_the_others_move_up(columns: int, after: int, shows_room: bool) -> None:
    """No memory is allocated for the next column, whether those allocated ahead are shown or hidden."""
    cache = RowsCache(tiny_config("llama"), room=2, shows_room=shows_room)
    before = [cache.update(*_states(3, 7, seed=layer), layer) for layer in range(2)]
    expected = [torch.cat([states[:, :, :after], states[:, :, after + columns : 7]], 2) for states in before[1]]
    memory = cache.layers[1].keys.data_ptr()
    cache.drop(columns, after=after)
    assert cache.get_seq_length() == 7 - columns
    shown = 9 if shows_room else 8 - columns
    assert cache.get_mask_sizes(1, 1) == (shown, 0)
    new = _states(3, 1, seed=9)
    updates = cache.update(*new, 1)
    for updated, remaining, own in zip(updates, expected, new, strict=True):
        assert updated.shape[2] == shown
        assert torch.equal(updated[:, :, : 8 - columns], torch.cat([remaining, own], 2))
    assert updates[0].data_ptr() == memory


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
    """``[rows, tokens, heads, width]`` in float64, one query at a time; ``seen`` is ``[rows, 1, tokens, columns]``."""
    attended = torch.empty(query.shape[0], query.shape[2], query.shape[1], WIDTH, dtype=torch.float64)
    for row, head, token in itertools.product(*map(range, query.shape[:3])):
        visible = seen[row, 0, token]
        k, v = (states[row, head * HEADS // query.shape[1]][visible].double() for states in (keys, values))
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
    keys, values = (states.to(dtype) for states in _states(rows, columns, seed=0))
    query = torch.randn(rows, HEADS * groups, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen = torch.ones(rows, 1, 1, columns, dtype=torch.bool)
    seen[0, ..., :2] = False
    seen[1, ..., -3:] = False
    hidden = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if mask == "summand" else seen
    attended, _ = decoding_attention(nn.Module(), query, keys, values, hidden, scaling=scaling)
    factor = WIDTH**-0.5 if scaling is None else scaling
    expected = _decoded(query, keys, values, seen, lambda scores: scores * factor)
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance / 2)


@TYPES
@pytest.mark.parametrize("groups", [1, 3])
def test_a_common_beginning_counts_as_if_each_row_held_it(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    rows, columns, tokens = 3, 7, 5
    keys, values = (states.to(dtype) for states in _states(rows, columns, seed=0))
    common = tuple(states[0].to(dtype) for states in _states(1, tokens, seed=2))
    query = torch.randn(rows, HEADS * groups, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.zeros(rows, 1, 1, columns)
    mask[0, ..., :2] = mask[1, ..., -3:] = float("-inf")
    layer = nn.Module()
    layer.layer_idx = 1
    options = {"scaling": 0.7, "beginning": KeysValues(layers={1: common})}
    attended, _ = decoding_attention(layer, query, keys, values, mask, **options)
    whole = [
        torch.cat([shared.expand(rows, -1, -1, -1), states], 2)
        for shared, states in zip(common, (keys, values), strict=True)
    ]
    seen = torch.cat([torch.ones(rows, 1, 1, tokens, dtype=torch.bool), mask == 0], -1)
    expected = _decoded(query, *whole, seen, lambda scores: scores * 0.7)  # type: ignore[misc]
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("changed", [{"softcap": 1.0}, {"query": torch.zeros(1, HEADS, 2, WIDTH)}])
def test_attention_that_cannot_see_a_common_beginning_refuses_it(changed: dict[str, Any]) -> None:
    keys, values = _states(1, 7, seed=0)
    arguments = {"query": torch.zeros(1, HEADS, 1, WIDTH), "beginning": KeysValues(), **changed}
    with pytest.raises(ValueError, match="Module does not support rows that share a beginning"):
        decoding_attention(nn.Module(), key=keys, value=values, attention_mask=None, **arguments)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_is_left_as_it_was_even_after_an_error(implementation: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert may_see_room(model)
    with suppress(KeyboardInterrupt), decoding(model):
        assert model.config._attn_implementation == (ATTENTION if implementation == "sdpa" else "eager")
        raise KeyboardInterrupt
    assert model.config._attn_implementation == implementation
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before


def test_parts_with_attention_of_their_own_get_it_back() -> None:
    """Gemma 4's encoder of sounds knows the plainest attention only, and refuses that of the text model."""
    text = {**SIZES, "head_dim": 16, "global_head_dim": 16}
    per_layer = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    sound = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    channels = {"subsampling_conv_channels": [8, 4]}
    model = random_model(Gemma4Config(text_config={**text, **per_layer}, audio_config={**sound, **channels}))
    configs = [model.config, model.config.text_config, model.config.audio_config]
    for _ in range(2):
        assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa", "eager"]
        with decoding(model):
            assert model.config.text_config._attn_implementation == ATTENTION
    assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa", "eager"]
