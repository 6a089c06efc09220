"""Architectures that public recipes name: the flat forward equals the padded one of transformers, in float32.

Rows are shorter and longer than the windows of four tokens; some share beginnings of 18 tokens (conftest.ROWS).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)
from trl.trainer.utils import add_fused_lm_head

from alignment.core.errors import ModelError
from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from alignment.models.kernels import row_attention
from tests.unit.models.conftest import (
    IGNORED,
    PROMPTS,
    ROWS,
    SIZES,
    gradients,
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
    "qwen2 with a window": lambda: Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        **WINDOW,
        head_dim=8,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **WINDOW, **BOTH, head_dim=8, query_pre_attn_scalar=12),
    "phi3 with a window": lambda: Phi3Config(**SIZES, **WINDOW),
    "starcoder2 with a window": lambda: Starcoder2Config(**SIZES, **WINDOW, embedding_dropout=0.0),
    "cohere2": lambda: Cohere2Config(**SIZES, **WINDOW, **BOTH, logit_scale=1.0),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "mixtral with a window": lambda: MixtralConfig(
        **SIZES, **WINDOW, num_local_experts=4, num_experts_per_tok=2, output_router_logits=False
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "qwen3 with experts": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=16),
}
SCALED = {"cohere2"}
"""Their logits are scaled, so TRL's head computes them."""


def model_of(name: str) -> PreTrainedModel:
    """A model of random weights, large enough that windows, caps and experts matter."""
    return random_model(CONFIGS[name]())


def assert_equal(model: PreTrainedModel, reference: PreTrainedModel, output: Any, expected: Any) -> None:
    mask = output.label_mask
    for name in ("logprobs", "entropy", "mean_logits"):
        own = getattr(output, "log_probs" if name == "logprobs" else name)
        assert relative(own[mask], getattr(expected, name)) < 1e-5, name
    output.loss.backward()
    expected.loss.backward()
    own, other = gradients(model), gradients(reference)
    assert own.keys() == other.keys()
    for name, gradient in own.items():
        assert relative(gradient, other[name]) < 1e-5, name


@pytest.mark.parametrize("rows", ["ragged", "pairs of one prompt", "turns of one conversation"])
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - SCALED))
def test_the_flat_forward_equals_the_padded_one(name: str, rows: str) -> None:
    model = model_of(name)
    reference = twin(model)
    install_causal(model)
    assert model.config._attn_implementation == ATTENTION
    batch = padded(ROWS[rows], side="left", extra=1)
    output = model(**batch.arguments(), fused_lm_head=True)
    assert_equal(model, reference, output, plain(reference, batch))


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - SCALED))
def test_a_packed_row_equals_its_rows_padded(name: str) -> None:
    model = model_of(name)
    reference = twin(model)
    install_causal(model)
    rows = [*ROWS["ragged"], *ROWS["pairs of one prompt"]]
    ids = torch.tensor([[token for prompt, answer in rows for token in (*prompt, *answer)]])
    positions = torch.cat([torch.arange(len(prompt) + len(answer)) for prompt, answer in rows])[None]
    labels = torch.tensor([[t for prompt, answer in rows for t in ([IGNORED] * len(prompt) + answer)]])
    output = model(input_ids=ids, position_ids=positions, labels=labels, fused_lm_head=True)
    assert_equal(model, reference, output, plain(reference, padded(rows)))


@pytest.mark.parametrize("name", sorted(SCALED))
def test_a_model_that_scales_its_logits_keeps_the_head_of_trl(name: str) -> None:
    model = model_of(name)
    reference = twin(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    install_causal(model)
    batch = padded(ROWS["ragged"])
    output = model(**batch.arguments(), fused_lm_head=True)
    assert relative(output.log_probs[output.label_mask], plain(reference, batch).logprobs) < 1e-5


@pytest.mark.parametrize("name", ["mistral with a window", "gemma2"])
def test_long_rows_are_computed_span_by_span(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than ``QUERIES`` have no stored softmax; spans leave out the keys before a window."""
    monkeypatch.setattr(row_attention, "QUERIES", 6)
    monkeypatch.setattr(row_attention, "SPAN", 5)
    row_attention._plan.cache_clear()
    model = model_of(name)
    reference = twin(model)
    install_causal(model)
    batch = padded([*ROWS["ragged"], *ROWS["turns of one conversation"]])
    output = model(**batch.arguments(), fused_lm_head=True)
    assert_equal(model, reference, output, plain(reference, batch))
    row_attention._plan.cache_clear()


@pytest.mark.parametrize("name", sorted(CONFIGS.keys()))
def test_greedy_answers_equal_those_of_transformers(name: str) -> None:
    model, reference = model_of(name), twin(model_of(name))
    use_flat_attention(model)
    answers = generate(model, PROMPTS, max_new_tokens=10, end_ids=[2], batch_size=5)
    assert answers == [greedy(reference, prompt, limit=10) for prompt in PROMPTS]


@torch.no_grad()
def test_capped_logits_are_what_is_sampled_and_scored() -> None:
    """A capped distribution is flatter: the same random numbers give other answers without the cap."""
    model, reference = model_of("gemma2"), twin(model_of("gemma2"))
    use_flat_attention(model)
    uniforms = torch.rand(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling = Sampling(temperature=1.0, uniforms=uniforms)
    answers = generate(model, PROMPTS, max_new_tokens=8, end_ids=[], batch_size=5, sampling=sampling)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        for step, token in enumerate(answer):
            logits = reference(input_ids=torch.tensor([[*prompt, *answer[:step]]])).logits[0, -1]
            cumulative = logits.double().softmax(-1).cumsum(-1)
            assert int((cumulative <= uniforms[row, step]).sum()) == token
    own = answer_statistics(model, answer_stream(PROMPTS, answers, torch.device("cpu")), temperature=0.7)
    batch = padded(list(zip(PROMPTS, answers, strict=True)))
    assert relative(own.logprobs, plain(reference, batch, temperature=0.7).logprobs) < 1e-5
    assert relative(own.mean_logits, plain(reference, batch, temperature=0.7).mean_logits) < 1e-5


def test_a_window_that_is_not_the_configurations_is_refused() -> None:
    """A model whose code windows otherwise than its configuration says would be computed wrongly without a word."""
    model = model_of("gemma2")
    install_causal(model)
    model.model.layers[0].self_attn.sliding_window = 3
    with pytest.raises(ValueError, match="asks attention for another window than its configuration's"):
        model(**padded(ROWS["ragged"]).arguments(), fused_lm_head=True)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, sliding_window=4),  # its code ignores the setting
        PhimoeConfig(**SIZES, sliding_window=4, num_local_experts=4),  # windows by its mask alone
    ],
    ids=lambda config: config.model_type,
)
def test_a_window_of_an_architecture_that_was_not_tried_runs_padded(config: PreTrainedConfig) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference = twin(model)
    assert not use_flat_attention(model)
    if config.model_type == "llama":
        prompts = [[5, 9, 2, 7, 8, 11, 3, 4, 6]]
        own = answer_statistics(model, answer_stream(prompts, [[7, 3]], torch.device("cpu")))
        assert relative(own.logprobs, plain(reference, padded([(prompts[0], [7, 3])])).logprobs) < 1e-5


def test_padding_of_a_capped_batch_never_reaches_a_row() -> None:
    """Left padding sees nothing. As NaN it would reach every row through the next layer's values."""
    model, reference = model_of("gemma2"), twin(model_of("gemma2"))
    use_flat_attention(model)
    batch = padded(ROWS["ragged"], side="left")
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    real = batch.attention_mask.bool()
    assert relative(model(**arguments).logits[real], reference(**arguments).logits[real]) < 1e-5


@pytest.mark.parametrize("windows", [{**WINDOW, **BOTH}, {"layer_types": ["full_attention"] * 2}])
def test_sinks_take_the_padded_path_and_say_so(caplog: pytest.LogCaptureFixture, windows: dict[str, Any]) -> None:
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **windows)).eval()
    with caplog.at_level(logging.WARNING):
        assert not use_flat_attention(model)
    assert "has attention that the padding-free path does not support" in caplog.text


def test_a_prefix_needs_full_attention() -> None:
    from peft import TaskType

    from alignment.models.assembly.adapters import add_adapter
    from alignment.models.forward.answers import unwrapped
    from tests.chained import PREFIX

    model = add_adapter(model_of("mistral with a window"), PREFIX, TaskType.CAUSAL_LM)
    install_causal(unwrapped(model))
    with pytest.raises(ModelError, match="a prefix needs full attention"):
        model(**padded(copy.deepcopy(ROWS["ragged"])).arguments(), fused_lm_head=True)
