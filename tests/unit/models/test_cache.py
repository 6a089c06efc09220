"""The cache and attention of decoding: what is written stays, hidden columns never count, nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Gemma4Config, LlamaConfig

from alignment.core.errors import ModelError
from alignment.models.forward.attention import KeysValues
from alignment.models.forward.decoding import decoding, may_see_room
from alignment.models.kernels.kv_cache import ATTENTION, RowsCache, decoding_attention, decoding_mask
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


def test_selected_rows_keep_their_columns_and_go_on() -> None:
    rows_cache, dynamic_cache = RowsCache(tiny_config("llama"), room=4), DynamicCache(config=tiny_config("llama"))
    rows = torch.tensor([0, 3])
    for cache in (rows_cache, dynamic_cache):
        for layer in range(2):
            cache.update(*_states(4, 6, seed=layer), layer)
    rows_cache.select(rows)
    dynamic_cache.batch_select_indices(rows)
    new = _states(2, 1, seed=9)
    for tensor, reference in zip(rows_cache.update(*new, 1), dynamic_cache.update(*new, 1), strict=True):
        assert torch.equal(tensor[:, :, :7], reference)


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


@pytest.mark.parametrize(("columns", "after"), [(1, 0), (2, 1), (3, 2), (6, 0)])
def test_dropped_columns_are_gone_and_the_others_move_up(columns: int, after: int) -> None:
    cache = RowsCache(tiny_config("llama"), room=2)
    before = [cache.update(*_states(3, 7, seed=layer), layer) for layer in range(2)]
    expected = [torch.cat([states[:, :, :after], states[:, :, after + columns : 7]], 2) for states in before[1]]
    cache.drop(columns, after=after)
    assert cache.get_seq_length() == 7 - columns
    new = _states(3, 1, seed=9)
    for updated, remaining, own in zip(cache.update(*new, 1), expected, new, strict=True):
        assert updated.shape[2] == 9, "no memory is allocated"
        assert torch.equal(updated[:, :, : 8 - columns], torch.cat([remaining, own], 2))


def test_columns_allocated_ahead_can_be_hidden_even_after_others_were_dropped() -> None:
    cache = RowsCache(tiny_config("llama"), room=4, shows_room=False)
    before = [cache.update(*_states(3, 7, seed=layer), layer) for layer in range(2)][1]
    remaining = [torch.cat([states[:, :, :1], states[:, :, 4:]], 2) for states in before]
    cache.drop(3, after=1)
    assert cache.get_mask_sizes(1, 1) == (5, 0)
    new = _states(3, 1, seed=9)
    for updated, earlier, own in zip(cache.update(*new, 1), remaining, new, strict=True):
        assert torch.equal(updated, torch.cat([earlier, own], 2))


def test_hidden_columns_are_filled_without_allocating_others() -> None:
    cache = RowsCache(tiny_config("llama"), room=4, shows_room=False)
    before, _ = cache.update(*_states(3, 7, seed=0), 0)
    for filled in range(8, 12):
        keys, _ = cache.update(*_states(3, 1, seed=filled), 0)
        assert keys.shape[2] == filled
        assert keys.data_ptr() == before.data_ptr()


def test_a_layer_with_another_kind_of_state_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ModelError, match="does not support layers that cache a LinearAttentionLayer"):
        RowsCache(config, room=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_of_one_new_token_equals_the_formula_in_float64(
    groups: int, scaling: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    rows, columns = 3, 7
    keys, values = (states.to(dtype) for states in _states(rows, columns, seed=0))
    query = torch.randn(rows, HEADS * groups, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen = torch.ones(rows, 1, 1, columns, dtype=torch.bool)
    seen[0, ..., :2] = False
    seen[1, ..., -3:] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    attended, _ = decoding_attention(nn.Module(), query, keys, values, mask, scaling=scaling)
    assert attended.shape == (rows, 1, HEADS * groups, WIDTH)
    for row in range(rows):
        for head in range(HEADS * groups):
            visible = seen[row, 0, 0]
            k, v = (states[row, head // groups][visible].double() for states in (keys, values))
            scores = k @ query[row, head, 0].double() * (WIDTH**-0.5 if scaling is None else scaling)
            expected = torch.softmax(scores, 0) @ v
            torch.testing.assert_close(attended[row, 0, head].double(), expected, rtol=tolerance, atol=tolerance / 2)


def test_a_boolean_mask_hides_columns_from_the_last_token_of_a_prompt() -> None:
    """As in the later layers of Gemma 4, which compute no other token of a prompt."""
    keys, values = _states(2, 6, seed=0)
    query = torch.randn(2, HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[False, False, False, True, True, True], [True, True, True, False, False, False]])
    attended, _ = decoding_attention(nn.Module(), query, keys, values, seen[:, None, None])
    for row, columns in enumerate([slice(3, 6), slice(0, 3)]):
        for head in range(HEADS):
            scores = keys[row, head, columns] @ query[row, head, 0] * WIDTH**-0.5
            expected = torch.softmax(scores, 0) @ values[row, head, columns]
            torch.testing.assert_close(attended[row, 0, head], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
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
    assert attended.shape == (rows, 1, HEADS * groups, WIDTH)
    for row in range(rows):
        for head in range(HEADS * groups):
            visible = mask[row, 0, 0] == 0
            k, v = (
                torch.cat([shared[head // groups], states[row, head // groups][visible]]).double()
                for shared, states in zip(common, (keys, values), strict=True)
            )
            expected = torch.softmax(k @ query[row, head, 0].double() * 0.7, 0) @ v
            torch.testing.assert_close(attended[row, 0, head].double(), expected, rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("changed", [{"softcap": 1.0}, {"query": torch.zeros(1, HEADS, 2, WIDTH)}])
def test_attention_that_cannot_see_a_common_beginning_refuses_it(changed: dict[str, Any]) -> None:
    keys, values = _states(1, 7, seed=0)
    arguments = {"query": torch.zeros(1, HEADS, 1, WIDTH), "beginning": KeysValues(), **changed}
    with pytest.raises(ValueError, match="Module does not support rows that share a beginning"):
        decoding_attention(nn.Module(), key=keys, value=values, attention_mask=None, **arguments)


def test_the_mask_of_one_step_is_a_summand_and_that_of_a_prompt_is_not() -> None:
    real = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]]).bool()
    step = decoding_mask(batch_size=2, q_length=1, kv_length=4, q_offset=2, attention_mask=real)
    assert step is not None
    assert (step == 0).squeeze().tolist() == [[False, True, True, False], [True, True, True, False]]
    assert bool((step[step != 0] == float("-inf")).all())
    prompt = decoding_mask(batch_size=2, q_length=3, kv_length=3, attention_mask=real[:, :3])
    assert prompt is not None
    assert prompt.dtype == torch.bool


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_capped_scores_are_those_of_the_formula_in_float64(tokens: int, masked: bool) -> None:
    """c·tanh(s / c), for one new token with a summand and for several with a boolean mask."""
    rows, columns, groups, cap = 2, 5, 2, 0.7
    keys, values = _states(rows, columns, seed=0)
    query = torch.randn(rows, HEADS * groups, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    causal = torch.ones(tokens, columns, dtype=torch.bool).tril(columns - tokens)
    seen = causal.expand(rows, 1, -1, -1).clone()
    mask = None
    if masked:
        seen[1, ..., :2] = False
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if tokens == 1 else seen
    attended, _ = decoding_attention(nn.Module(), query, keys, values, mask, softcap=cap)
    assert attended.shape == (rows, tokens, HEADS * groups, WIDTH)
    for row in range(rows):
        for head in range(HEADS * groups):
            for token in range(tokens):
                visible = seen[row, 0, token]
                k, v = (states[row, head // groups][visible].double() for states in (keys, values))
                scores = k @ query[row, head, token].double() * WIDTH**-0.5
                expected = torch.softmax(cap * torch.tanh(scores / cap), 0) @ v
                torch.testing.assert_close(attended[row, token, head].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_is_left_as_it_was_even_after_an_error(implementation: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}

    def fail() -> None:
        assert may_see_room(model)
        with decoding(model):
            assert model.config._attn_implementation == (ATTENTION if implementation == "sdpa" else "eager")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
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
