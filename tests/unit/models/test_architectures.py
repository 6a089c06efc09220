"""Architectures that public recipes name, and those that cache, window, mask or cap in ways of their own. Each is
compared with the padded forward of transformers, in float32. Rows are shorter and longer than the windows of four
tokens; some share beginnings of 18 tokens (conftest.ROWS)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GraniteConfig,
    JetMoeConfig,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    ModernBertDecoderConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    SmolLM3Config,
    XGLMConfig,
    xLSTMConfig,
)
from trl.trainer.utils import add_fused_lm_head

from alignment.config.model import AdapterConfig
from alignment.core.errors import ModelError
from alignment.core.model_files import positions_in
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import answer_statistics, answer_stream, unwrapped
from alignment.models.forward.causal import install_causal
from alignment.models.forward.decoding import may_see_room
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.forward.head import label_statistics, logit_cap, scales_logits
from alignment.models.forward.rows import stream
from alignment.models.forward.shared_prompts import can_read
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.models.conftest import (
    CPU,
    FULL,
    LORA,
    PROMPTS,
    ROWS,
    SIZES,
    greedy,
    padded,
    plain,
    random_model,
    relative,
    twin,
)

WINDOW = {"sliding_window": 4}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral with a window": lambda: MistralConfig(**SIZES, **WINDOW),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **SIZES, **WINDOW, head_dim=8, query_pre_attn_scalar=12, attn_logit_softcapping=1.5, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **WINDOW, **BOTH, head_dim=8, query_pre_attn_scalar=12),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=3.0),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere2": lambda: Cohere2Config(**SIZES, **WINDOW, **BOTH, logit_scale=1.0),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "qwen3 with experts": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=16),
}
SCALED = {"cohere", "cohere2", "granite"}


def model_of(name: str) -> PreTrainedModel:
    return random_model(CONFIGS[name]()) if name in CONFIGS else tiny_model(name)


@pytest.mark.parametrize("name", [*sorted(SCALED), "a head with a bias"])
def test_heads_that_are_not_one_product_are_left_to_trl(name: str) -> None:
    model = model_of(name if name in SCALED else "olmo2")
    if name not in SCALED:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2.0, 2.0, 128))
    reference = twin(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    install_causal(model)
    batch = padded(ROWS["ragged"])
    output = model(**batch.arguments(), fused_lm_head=True)
    assert relative(output.log_probs[output.label_mask], plain(reference, batch).logprobs) < 1e-5


@pytest.mark.parametrize("name", sorted(CONFIGS.keys()))
def test_greedy_answers_equal_those_of_transformers(name: str) -> None:
    model, reference = model_of(name), twin(model_of(name))
    use_flat_attention(model)
    answers = generate(model, PROMPTS, max_new_tokens=10, end_ids=[2], batch_size=5)
    assert answers == [greedy(reference, prompt, limit=10) for prompt in PROMPTS]


def test_a_window_that_is_not_the_configurations_is_refused() -> None:
    """A model whose code windows otherwise than its configuration says would be computed wrongly without a word."""
    model = model_of("gemma2")
    install_causal(model)
    model.model.layers[0].self_attn.sliding_window = 3
    with pytest.raises(ValueError, match="asks attention for another window than its configuration's"):
        model(**padded(ROWS["ragged"]).arguments(), fused_lm_head=True)


TOKENS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WITHOUT_INTERFACE: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_neo": lambda: GPTNeoConfig(
        **TOKENS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local", "global"], 1]], window_size=4
    ),
    "falcon with alibi": lambda: FalconConfig(**TOKENS, **LAYERS, alibi=True),
}
HIDING_BY_A_MASK: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon": lambda: FalconConfig(**TOKENS, **LAYERS),
    "xglm": lambda: XGLMConfig(**TOKENS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
ALIKE = {**SIZES, "num_key_value_heads": 4}
CACHING_OTHERWISE: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v3": lambda: DeepseekV3Config(**ALIKE, **LATENT, **ROUTED, first_k_dense_replace=1),
    "jetmoe": lambda: JetMoeConfig(**SIZES | {"num_key_value_heads": 2}, kv_channels=8, num_local_experts=4),
}


def assert_answers_are_those_of_transformers(model: PreTrainedModel, reference: PreTrainedModel) -> None:
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


@pytest.mark.parametrize("name", [*WITHOUT_INTERFACE, *HIDING_BY_A_MASK])
def test_models_that_count_columns_see_no_empty_ones_and_others_hide_them(name: str) -> None:
    model = random_model((WITHOUT_INTERFACE | HIDING_BY_A_MASK)[name]())
    reference = twin(model)
    assert not use_flat_attention(model)
    assert may_see_room(model) is (name in HIDING_BY_A_MASK)
    assert_answers_are_those_of_transformers(model, reference)


@pytest.mark.parametrize("name", [*CACHING_OTHERWISE, "doge"])
def test_prompts_are_read_padded_where_the_cache_holds_something_else_than_attention_sees(name: str) -> None:
    """Doge's mask depends on the values, so that its attention is not flat either."""
    model = random_model(DogeConfig(**SIZES) if name == "doge" else CACHING_OTHERWISE[name]())
    if name == "doge":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.A)
    reference = twin(model)
    assert use_flat_attention(model) is (name != "doge")
    assert not can_read(model)
    assert_answers_are_those_of_transformers(model, reference)
    assert_scores_are_those_of_transformers(model, reference)


def test_caps_and_factors_of_logits_are_known_under_other_names() -> None:
    """Of RecurrentGemma, xLSTM and Inkling."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = random_model(RecurrentGemmaConfig(**TOKENS, **sizes, attention_window_size=8, logits_soft_cap=1.5))
    assert_scores_are_those_of_transformers(model, twin(model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(xLSTMConfig(**TOKENS, hidden_size=64, num_hidden_layers=1))
    assert logit_cap(model) == 30.0
    model = tiny_model()
    assert not scales_logits(model)
    model.config.logits_mup_width_multiplier = 24.0
    assert scales_logits(model)


def test_rows_that_would_change_the_frequencies_of_their_neighbours_are_refused(tmp_path: Path) -> None:
    factors: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = random_model(Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=16))
    model.save_pretrained(tmp_path)
    assert positions_in(tmp_path) == positions_of(model.base_model) == 16
    trunk_states(model.base_model, stream([[3] * 16, [5, 6, 7]], CPU))
    with pytest.raises(ModelError, match=r"a row of 17 tokens .* 16 positions before LongRoPE"):
        trunk_states(model.base_model, stream([[3] * 17, [5, 6, 7]], CPU))
    with pytest.raises(ModelError, match="a row of 17 tokens"):
        generate(model, [[5, 6, 7]], max_new_tokens=14, end_ids=[], batch_size=1)


def test_a_model_with_a_layer_between_its_trunk_and_its_head_is_refused(tmp_path: Path) -> None:
    """Its logits would be computed without that layer."""
    random_model(ModernBertDecoderConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ModernBertDecoder\w+ makes its logits .* lm_head\.dense\.weight, lm_"):
        load_policy(Lineage(source="path:modernbert", base=tmp_path, adapters=()), torch.float32)


ALL_LINEAR = AdapterConfig(rank=4, target_modules=["all-linear"])
SPECIAL = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def saved(folder: Path, model: PreTrainedModel) -> Lineage:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(str(folder))
    return Lineage(source="path:images", base=folder, adapters=())


def gemma3(folder: Path) -> Lineage:
    text = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **SPECIAL)
    return saved(folder, random_model(config))


def mllama(folder: Path) -> Lineage:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**SIZES, "cross_attention_layers": [1], "rope_parameters": rope}
    tiles = {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "num_global_layers": 1}
    output = {"vision_output_dim": 32, "intermediate_layers_indices": [0]}
    vision = {**VISION, **tiles, **output, "attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return saved(folder, MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision)))


def trained_without_gradient(model: nn.Module) -> list[str]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("layers.0." in name for name in trained)
    return [name for name, parameter in trained.items() if parameter.grad is None]


@pytest.mark.parametrize("adapter", [FULL, LORA, ALL_LINEAR], ids=["full", "lora", "all linear modules"])
@pytest.mark.parametrize("base", [gemma3, mllama])
def test_all_that_is_trained_of_a_model_with_images_gets_gradients(
    tmp_path: Path, base: Callable[[Path], Lineage], adapter: AdapterConfig
) -> None:
    model = load_policy(base(tmp_path / "base"), torch.float32)
    use_flat_attention(model)
    adapted = add_adapter(model, adapter, TaskType.CAUSAL_LM)
    states = trunk_states(unwrapped(adapted).base_model, stream(PROMPTS, CPU))
    label_statistics(unwrapped(adapted), states, torch.tensor([3] * len(states))).logprobs.sum().backward()
    assert trained_without_gradient(adapted) == []
