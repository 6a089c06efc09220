"""The fast forward behind TRL's calls equals the plain padded forward: values, loss and every gradient, in float32."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import TaskType

from alignment.config.model import AdapterConfig
from alignment.core.errors import ModelError
from alignment.models.forward.answers import answer_statistics, answer_stream, unwrapped
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import install_causal, install_scalar
from alignment.models.forward.flat import use_flat_attention
from tests.tiny import ARCHITECTURES, tiny_model, tiny_scorer
from tests.unit.models.conftest import (
    CPU,
    FULL,
    KINDS,
    LORA,
    ROWS,
    adapted,
    assert_learns_alike,
    assert_same_gradients,
    gradients,
    packed,
    padded,
    plain,
    relative,
    twin,
)
from tests.unit.models.test_architectures import CONFIGS, SCALED, model_of

SHARING = ("ragged", "pairs of one prompt", "turns of one conversation")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *(("gpt2", rows) for rows in ROWS),
        *((name, rows) for name in ARCHITECTURES for rows in ("ragged", "pairs of one prompt")),
        *((name, rows) for name in sorted(CONFIGS.keys() - SCALED) for rows in (*SHARING, "packed")),
    ],
)
def test_the_flat_path_equals_the_padded_forward(name: str, rows: str) -> None:
    """GPT-2 learns its positions: rotary ones would not show that they restart with every row."""
    model = model_of(name)
    reference = twin(model)
    install_causal(model)
    assert model.config._attn_implementation == ATTENTION
    several = [*ROWS["ragged"], *ROWS["pairs of one prompt"]] if rows == "packed" else ROWS[rows]
    batch = padded(several, side="right" if name in ARCHITECTURES else "left", extra=2)
    assert_learns_alike(model, reference, batch, packed(several) if rows == "packed" else None)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@KINDS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_and_gradient_checkpointing_change_nothing(
    architecture: str, adapter: AdapterConfig, checkpointing: bool
) -> None:
    model = adapted(tiny_model(architecture), adapter)
    reference = twin(model)
    install_causal(unwrapped(model))
    if checkpointing:
        unwrapped(model).activation_checkpointing_enable({"use_reentrant": False})
    assert_learns_alike(model.train(), reference, padded(ROWS["ragged"]))


@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_what_stands_in_it_never_change_the_loss(side: str, extra: int) -> None:
    model = tiny_model()
    install_causal(model)
    tight = model(**padded(ROWS["ragged"]).arguments(), fused_lm_head=True).loss
    batch = padded(ROWS["ragged"], side=side, extra=extra)
    batch.input_ids[batch.attention_mask == 0] = 77
    assert torch.equal(model(**batch.arguments(), fused_lm_head=True).loss, tight)


def _stream_lengths(model: Any) -> list[int]:
    lengths: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    return lengths


@pytest.mark.parametrize(
    ("rows", "computed"),
    [
        ("pairs of one prompt", (18 + 3) + (19 + 1) + 3 + 3),  # the second answer shares its first token, too
        ("answers to one prompt", (18 + 2) + 3 + 0 + 1),
        ("ragged", 7 + 3 + 12),
    ],
)
def test_a_common_beginning_is_computed_once(rows: str, computed: int) -> None:
    model = tiny_model()
    install_causal(model)
    lengths = _stream_lengths(model)
    model(**padded(ROWS[rows]).arguments(), fused_lm_head=True)
    assert lengths == [computed]


def test_dropout_inside_attention_takes_the_padded_path(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(attention_dropout=0.1)
    with caplog.at_level(logging.WARNING):
        install_causal(model)
    assert model.config._attn_implementation != ATTENTION
    assert len(caplog.records) == 1


def test_a_batch_without_labelled_tokens_has_loss_zero_and_no_gradient() -> None:
    model = tiny_model()
    install_causal(model)
    batch = padded([([5, 6, 7], [])])
    loss = model(**batch.arguments(), fused_lm_head=True).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(gradient.abs().sum() == 0 for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[1, 1, 1, 1], [1, 0, 1, 1]], ValueError, "row 1 of the batch has padding between its tokens"),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], ValueError, "row 1 of the batch has no real token"),
        ([[1, 1, 1, 1], [1, 1, 0, 0]], ValueError, "padding has a label"),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], ModelError, "a row of 4 tokens is longer than the model's 3 positions"),
    ],
)
def test_batches_that_cannot_be_computed_are_refused(
    mask: list[list[int]], error: type[Exception], message: str
) -> None:
    model = tiny_model(max_position_embeddings=3 if error is ModelError else 4)
    install_causal(model)
    ids = torch.full((2, 4), 5)
    with pytest.raises(error, match=message):
        model(input_ids=ids, attention_mask=torch.tensor(mask), labels=ids, fused_lm_head=True)


def _plain_score(model: Any, ids: list[int]) -> torch.Tensor:
    states = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return model.score(states[0, -1])[0]


@pytest.mark.parametrize("side", ["right", "left"])
@KINDS
@pytest.mark.parametrize(
    ("architecture", "changes"), [*((name, {}) for name in ARCHITECTURES), ("mistral", {"sliding_window": 3})]
)
def test_a_score_stands_at_the_last_real_token(
    architecture: str, changes: dict[str, Any], side: str, adapter: AdapterConfig
) -> None:
    """Some rows end with the pad token, which is a token of theirs."""
    model = adapted(tiny_scorer(architecture, **changes), adapter, TaskType.SEQ_CLS)
    reference = twin(model)
    install_scalar(unwrapped(model))
    rows = [pair for name in ROWS for pair in ROWS[name]]
    batch = padded(rows, side=side, extra=3)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = torch.stack([_plain_score(unwrapped(reference), [*prompt, *answer]) for prompt, answer in rows])
    assert logits.shape == (len(rows), 1)
    assert logits.dtype == torch.float32
    assert relative(logits[:, 0], expected) < 1e-5
    logits.sum().backward()
    expected.sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize(("architecture", "adapter"), [*((name, LORA) for name in ARCHITECTURES), ("llama", FULL)])
def test_under_autocast_gradients_stay_close_to_those_of_the_plain_forward(
    architecture: str, adapter: AdapterConfig
) -> None:
    """Float32 weights, products in bfloat16: how a stage trains by default."""
    model = adapted(tiny_model(architecture), adapter)
    reference = twin(model)
    install_causal(unwrapped(model))
    batch = padded(ROWS["pairs of one prompt"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch.arguments(), fused_lm_head=True).loss
    loss.backward()
    expected = plain(reference, batch).loss
    expected.backward()
    assert relative(loss, expected) < 0.02
    for name in ("q_proj", "v_proj", "down_proj"):
        of_model, of_reference = (
            torch.cat([g.flatten() for n, g in gradients(policy).items() if name in n]) for policy in (model, reference)
        )
        assert relative(of_model, of_reference) < 0.15, name


PROMPTS = [prompt for name in ROWS for prompt, _ in ROWS[name]]
ANSWERS = [answer for name in ROWS for _, answer in ROWS[name]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gemma2", "cohere2", "granite"])
def test_statistics_of_answers_equal_the_plain_forward(architecture: str, temperature: float) -> None:
    """Gemma 2 caps its logits, Cohere multiplies and Granite divides them."""
    model = model_of(architecture)
    reference = twin(model)
    use_flat_attention(model)
    statistics = answer_statistics(model, answer_stream(PROMPTS, ANSWERS, CPU), temperature=temperature)
    expected = plain(reference, padded(list(zip(PROMPTS, ANSWERS, strict=True))), temperature=temperature)
    for name in ("logprobs", "entropy", "mean_logits"):
        assert relative(getattr(statistics, name), getattr(expected, name)) < 1e-5
    assert torch.equal(statistics.is_top1, expected.is_top1)


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model()
    use_flat_attention(model)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(128))
    with pytest.raises(ModelError, match="adds a bias"):
        answer_statistics(model, answer_stream([[5, 6]], [[7, 2]], CPU))
