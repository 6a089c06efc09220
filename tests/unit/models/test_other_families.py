"""Architectures that cache, window, mask or cap in ways of their own: what is read, sampled and scored is theirs.

Rows have more tokens than windows have; answers are long enough for rows to be refilled and for columns to be dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    GPTNeoConfig,
    GPTNeoXJapaneseConfig,
    HrmTextConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MllamaForCausalLM,
    ModernBertDecoderConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    XGLMConfig,
    xLSTMConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from alignment.core.errors import ModelError
from alignment.core.model_files import positions_in
from alignment.models.assembly.load import Lineage, load_policy, name_trunk
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.decoding import decoding, may_see_room
from alignment.models.forward.decoding_rows import DecodingRows
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.forward.head import logit_cap, scales_logits
from alignment.models.forward.rows import stream
from alignment.models.forward.shared_prompts import can_read
from alignment.models.forward.waiting_prompts import Entrants
from tests.tiny import tiny_model
from tests.unit.models.conftest import PROMPTS, SIZES, greedy, padded, plain, random_model, relative, twin

CPU = torch.device("cpu")
TOKENS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
WITHOUT_INTERFACE: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_neo": lambda: GPTNeoConfig(
        **TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["local", "global"], 1]],
        window_size=4,
        max_position_embeddings=512,
    ),
    "bloom": lambda: BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "falcon with alibi": lambda: FalconConfig(
        **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "mpt": lambda: MptConfig(**TOKENS, d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
}
HIDING_BY_A_MASK: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon": lambda: FalconConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gpt_neox_japanese": lambda: GPTNeoXJapaneseConfig(
        **TOKENS, hidden_size=32, intermediate_multiple_size=2, num_hidden_layers=2, num_attention_heads=4
    ),
    "xglm": lambda: XGLMConfig(**TOKENS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
CACHING_OTHERWISE: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        **LATENT,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "diffllama": lambda: DiffLlamaConfig(**SIZES),
    "hrm_text": lambda: HrmTextConfig(
        **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
        head_dim=8,
        H_cycles=1,
        L_cycles=2,
    ),
    "jetmoe": lambda: JetMoeConfig(
        **TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    ),
}


def assert_answers_are_those_of_transformers(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """For prompts that take over rows at different steps."""
    free = [greedy(reference, prompt, limit=40, ends=()) for prompt in PROMPTS]
    ends = [free[0][9], free[3][20]]
    answers = generate(model, PROMPTS, max_new_tokens=40, end_ids=ends, batch_size=2)
    assert answers == [greedy(reference, prompt, limit=40, ends=ends) for prompt in PROMPTS]


def assert_scores_are_those_of_transformers(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    answers = [[7, 3], [9, 9, 4], [5], [11, 12, 13, 2], [6, 2]]
    own = answer_statistics(model, answer_stream(PROMPTS, answers, CPU))
    expected = plain(reference, padded(list(zip(PROMPTS, answers, strict=True))))
    for name in ("logprobs", "entropy", "mean_logits"):
        assert relative(getattr(own, name), getattr(expected, name)) < 1e-5, name


@pytest.mark.parametrize("name", sorted(WITHOUT_INTERFACE))
def test_models_that_count_columns_see_no_empty_ones(name: str) -> None:
    model = random_model(WITHOUT_INTERFACE[name]())
    reference = twin(model)
    assert not use_flat_attention(model)
    assert not may_see_room(model)
    assert_answers_are_those_of_transformers(model, reference)


@pytest.mark.parametrize("name", sorted(HIDING_BY_A_MASK))
def test_empty_columns_stay_hidden_from_models_that_mask_them_themselves(name: str) -> None:
    model = random_model(HIDING_BY_A_MASK[name]())
    reference = twin(model)
    assert not use_flat_attention(model)
    assert may_see_room(model)
    assert_answers_are_those_of_transformers(model, reference)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(WITHOUT_INTERFACE))
def test_a_step_of_models_that_count_columns_copies_no_earlier_ones(name: str) -> None:
    model = random_model(WITHOUT_INTERFACE[name]())
    rows = DecodingRows.begin(model, Entrants(numbers=[0], prompts=PROMPTS[:1], uniforms=None), max_new_tokens=4)
    memory = [layer.keys.data_ptr() for layer in rows.cache.layers]
    with decoding(model):
        rows.step(rows.next_tokens(1.0))
    assert rows.cache.get_seq_length() == len(PROMPTS[0]) + 1
    assert [layer.keys.data_ptr() for layer in rows.cache.layers] == memory


@pytest.mark.parametrize("name", sorted(CACHING_OTHERWISE))
def test_prompts_are_read_padded_where_the_cache_holds_something_else_than_attention_sees(name: str) -> None:
    model = random_model(CACHING_OTHERWISE[name]())
    reference = twin(model)
    assert use_flat_attention(model)
    assert not can_read(model)
    assert_answers_are_those_of_transformers(model, reference)
    assert_scores_are_those_of_transformers(model, reference)


def test_a_mask_that_depends_on_the_values_takes_the_padded_path() -> None:
    model = random_model(DogeConfig(**SIZES))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
    reference = twin(model)
    assert not use_flat_attention(model)
    assert_answers_are_those_of_transformers(model, reference)
    assert_scores_are_those_of_transformers(model, reference)


def test_logits_are_capped_under_the_name_of_recurrent_gemma() -> None:
    config = RecurrentGemmaConfig(
        **TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_window_size=8,
        logits_soft_cap=1.5,
    )
    model = random_model(config)
    assert_scores_are_those_of_transformers(model, twin(model))


def test_logits_are_capped_under_the_name_of_xlstm() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(xLSTMConfig(**TOKENS, hidden_size=64, num_hidden_layers=1))
    assert logit_cap(model) == 30.0


def test_states_that_are_scaled_before_the_head_are_known() -> None:
    model = tiny_model()
    assert not scales_logits(model)
    model.config.logits_mup_width_multiplier = 24.0  # as in Inkling
    assert scales_logits(model)


def _long_rope() -> PreTrainedModel:
    factors: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    return random_model(Phi3Config(**SIZES, rope_parameters=parameters, original_max_position_embeddings=16))


def test_rows_that_would_change_the_frequencies_of_their_neighbours_are_refused() -> None:
    model = _long_rope()
    assert positions_of(model.base_model) == 16
    trunk_states(model.base_model, stream([[3] * 16, [5, 6, 7]], CPU))
    with pytest.raises(ModelError, match="a row of 17 tokens is longer than the model's 16 positions before LongRoPE"):
        trunk_states(model.base_model, stream([[3] * 17, [5, 6, 7]], CPU))
    with pytest.raises(ModelError, match="a row of 17 tokens"):
        generate(model, [[5, 6, 7]], max_new_tokens=14, end_ids=[], batch_size=1)


def test_a_folder_has_the_positions_of_the_model_in_it(tmp_path: Path) -> None:
    model = _long_rope()
    model.save_pretrained(tmp_path)
    assert positions_in(tmp_path) == positions_of(model.base_model) == 16


def test_a_text_model_of_llama_4_has_a_trunk(tmp_path: Path) -> None:
    config = Llama4TextConfig(
        **SIZES,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=512,
    )
    random_model(config).save_pretrained(tmp_path)
    model = load_policy(Lineage(source="path:llama4", base=tmp_path, adapters=()), torch.float32)
    reference = twin(model)
    assert model.base_model is model.model
    use_flat_attention(model)
    assert_scores_are_those_of_transformers(model, reference)


def test_a_text_model_of_llama_with_images_has_a_trunk() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = MllamaTextConfig(**SIZES, cross_attention_layers=[1], rope_parameters=rope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = name_trunk(MllamaForCausalLM(config).eval())
    reference = twin(model)
    assert model.base_model is model.model
    assert use_flat_attention(model)
    assert model.config._attn_implementation == ATTENTION
    assert_scores_are_those_of_transformers(model, reference)


def test_a_model_with_a_layer_between_its_trunk_and_its_head_is_refused(tmp_path: Path) -> None:
    """Its logits would be computed without that layer."""
    random_model(ModernBertDecoderConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ModernBertDecoder\w+ makes its logits .* lm_head\.dense\.weight, lm_"):
        load_policy(Lineage(source="path:modernbert", base=tmp_path, adapters=()), torch.float32)
