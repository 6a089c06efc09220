"""The fast forward behind TRL's calls equals the plain padded forward: values, loss and every gradient, in float32."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from peft import TaskType
from trl.trainer.utils import add_fused_lm_head

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.core.errors import ModelError
from alignment.models.assembly.adapters import add_adapter
from alignment.models.forward import flat, head_chunks
from alignment.models.forward.answers import scalar_scores, unwrapped
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import install_causal, install_scalar
from alignment.models.forward.rows import stream
from alignment.models.kernels import row_attention
from tests.oracles.close import close
from tests.tiny import ARCHITECTURES, liven, tiny_model, tiny_scorer
from tests.unit.models.conftest import IGNORED, PAD, ROWS, gradients, padded, plain, relative, twin

LORA = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0)
FULL = AdapterConfig(kind=AdapterKind.full)


def _with_adapter(model: Any, adapter: AdapterConfig, task: TaskType = TaskType.CAUSAL_LM) -> Any:
    """The model with an adapter that does change it."""
    wrapped = add_adapter(model, adapter, task)
    liven(wrapped)
    return wrapped


def _assert_same_statistics(output: Any, expected: Any) -> None:
    mask = output.label_mask
    for name in ("logprobs", "entropy", "mean_logits"):
        statistic = getattr(output, "log_probs" if name == "logprobs" else name)
        assert relative(statistic[mask], getattr(expected, name)) < 1e-5, name
        assert statistic[~mask].abs().sum() == 0, name
    assert torch.equal(output.is_top1[mask], expected.is_top1)
    assert relative(output.loss, expected.loss) < 1e-5


def _assert_same_gradients(model: torch.nn.Module, other: torch.nn.Module) -> None:
    model_gradients, expected = gradients(model), gradients(other)
    assert model_gradients.keys() == expected.keys()
    for name, gradient in model_gradients.items():
        assert relative(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt_neox"])
def test_the_flat_path_equals_the_padded_forward(architecture: str, rows: str, side: str) -> None:
    model = tiny_model(architecture)
    reference = twin(model)
    install_causal(model)
    assert model.config._attn_implementation == ATTENTION
    batch = padded(ROWS[rows], side=side, extra=2)
    output = model(**batch.arguments(), fused_lm_head=True)
    expected = plain(reference, batch)
    _assert_same_statistics(output, expected)
    output.loss.backward()
    expected.loss.backward()
    _assert_same_gradients(model, reference)


def test_an_attention_scale_of_its_own_is_kept() -> None:
    """Granite and Gemma 2 scale otherwise than by 1/√width of a head."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    reference = twin(model)
    install_causal(model)
    batch = padded(ROWS["ragged"])
    _assert_same_statistics(model(**batch.arguments(), fused_lm_head=True), plain(reference, batch))


@pytest.mark.parametrize("side", ["right", "left"])
def test_learned_positions_restart_with_every_row(side: str) -> None:
    """Rotary positions would not show it: only distances within a row matter to them."""
    model = tiny_model("gpt2")
    reference = twin(model)
    install_causal(model)
    assert model.config._attn_implementation == ATTENTION
    batch = padded(ROWS["ragged"], side=side, extra=2)
    output = model(**batch.arguments(), fused_lm_head=True)
    expected = plain(reference, batch)
    _assert_same_statistics(output, expected)
    output.loss.backward()
    expected.loss.backward()
    _assert_same_gradients(model, reference)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_and_gradient_checkpointing_change_nothing(
    architecture: str, adapter: AdapterConfig, checkpointing: bool
) -> None:
    model = _with_adapter(tiny_model(architecture), adapter)
    reference = twin(model)
    install_causal(unwrapped(model))
    if checkpointing:
        unwrapped(model).activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = padded(ROWS["ragged"])
    output = model(**batch.arguments(), fused_lm_head=True)
    expected = plain(reference, batch)
    _assert_same_statistics(output, expected)
    output.loss.backward()
    expected.loss.backward()
    _assert_same_gradients(model, reference)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_equals_its_rows_padded(architecture: str) -> None:
    model = tiny_model(architecture)
    reference = twin(model)
    install_causal(model)
    rows = ROWS["ragged"]
    ids = torch.tensor([[token for prompt, answer in rows for token in (*prompt, *answer)]])
    positions = torch.cat([torch.arange(len(prompt) + len(answer)) for prompt, answer in rows])[None]
    labels = torch.tensor([[t for prompt, answer in rows for t in ([IGNORED] * len(prompt) + answer)]])
    output = model(input_ids=ids, position_ids=positions, labels=labels, fused_lm_head=True)
    expected = plain(reference, padded(rows))
    _assert_same_statistics(output, expected)
    output.loss.backward()
    expected.loss.backward()
    _assert_same_gradients(model, reference)


@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_changes_the_loss(side: str, extra: int) -> None:
    model = tiny_model()
    install_causal(model)
    tight = model(**padded(ROWS["ragged"]).arguments(), fused_lm_head=True).loss
    loose = model(**padded(ROWS["ragged"], side=side, extra=extra).arguments(), fused_lm_head=True).loss
    assert torch.equal(loose, tight)


def test_what_stands_in_padding_never_changes_the_loss() -> None:
    model = tiny_model()
    install_causal(model)
    batch = padded(ROWS["ragged"])
    loss = model(**batch.arguments(), fused_lm_head=True).loss
    batch.input_ids[batch.attention_mask == 0] = 77
    assert torch.equal(model(**batch.arguments(), fused_lm_head=True).loss, loss)


def test_labels_on_padding_are_refused() -> None:
    model = tiny_model()
    install_causal(model)
    batch = padded(ROWS["ragged"])
    batch.labels[batch.attention_mask == 0] = 77
    with pytest.raises(ValueError, match="padding has a label"):
        model(**batch.arguments(), fused_lm_head=True)


def test_a_row_longer_than_the_models_positions_is_refused() -> None:
    model = tiny_model(max_position_embeddings=8)
    install_causal(model)
    with pytest.raises(ModelError, match="a row of 12 tokens is longer than the model's 8 positions"):
        model(**padded(ROWS["ragged"]).arguments(), fused_lm_head=True)


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
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    model(**padded(ROWS[rows]).arguments(), fused_lm_head=True)
    assert seen == [computed]


@pytest.mark.parametrize(
    "limits",
    [{"QUERIES": 4, "SPAN": 3}, {"QUERIES": 4, "SPAN": 3, "SCORES": 0}, {"CALL": 0}, {"CALL": 10**9}],
    ids=str,
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_how_rows_are_put_together_in_attention_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, architecture: str, limits: dict[str, int]
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(row_attention, name, value)
    row_attention._plan.cache_clear()
    model = tiny_model(architecture)
    reference = twin(model)
    install_causal(model)
    for rows in ("pairs of one prompt", "ragged", "answers to one prompt"):
        batch = padded(ROWS[rows])
        model(**batch.arguments(), fused_lm_head=True).loss.backward()
        plain(reference, batch).loss.backward()
    row_attention._plan.cache_clear()
    _assert_same_gradients(model, reference)


@pytest.mark.parametrize("multiple", [2, 16, 64])
@pytest.mark.parametrize("rows", ["ragged", "pairs of one prompt"])
def test_filling_of_the_stream_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: str, multiple: int) -> None:
    model = tiny_model()
    reference = twin(model)
    install_causal(model)
    monkeypatch.setattr(flat, "_multiple", lambda _: multiple)
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    batch = padded(ROWS[rows])
    loss, expected = model(**batch.arguments(), fused_lm_head=True).loss, plain(reference, batch).loss
    loss.backward()
    expected.backward()
    assert relative(loss, expected) < 1e-6
    _assert_same_gradients(model, reference)
    assert seen[0] % multiple == 0


def test_streams_in_bfloat16_come_in_few_lengths() -> None:
    model = tiny_model().to(torch.bfloat16)
    install_causal(model)
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    for length in range(3, 90, 7):
        model(**padded([([5] * length, [6])]).arguments(), fused_lm_head=True)
    assert set(seen) == {64, 128}


def test_dropout_inside_attention_takes_the_padded_path(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(attention_dropout=0.1)
    with caplog.at_level(logging.WARNING):
        install_causal(model)
    assert model.config._attn_implementation != ATTENTION
    assert len(caplog.records) == 1


def test_the_loss_divides_by_the_tokens_of_the_whole_optimiser_batch() -> None:
    model = tiny_model()
    install_causal(model)
    rows = ROWS["ragged"]
    whole = model(**padded(rows).arguments(), fused_lm_head=True).loss
    count = torch.tensor(sum(len(answer) for _, answer in rows))
    parts = [model(**padded([row]).arguments(), fused_lm_head=True, num_items_in_batch=count).loss for row in rows]
    assert relative(sum(parts), whole) < 1e-6


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model = tiny_model()
    reference = copy.deepcopy(model)
    install_causal(model)
    install_causal(reference)
    batch = padded(ROWS["ragged"])
    expected = reference(**batch.arguments(), fused_lm_head=True)
    expected.loss.backward()
    monkeypatch.setattr(head_chunks, "CHUNK", chunk)
    output = model(**batch.arguments(), fused_lm_head=True)
    output.loss.backward()
    assert relative(output.log_probs, expected.log_probs) < 1e-6
    assert relative(output.entropy, expected.entropy) < 1e-6
    assert torch.equal(output.is_top1, expected.is_top1)
    _assert_same_gradients(model, reference)


def test_a_batch_without_labelled_tokens_has_loss_zero_and_no_gradient() -> None:
    model = tiny_model()
    install_causal(model)
    batch = padded([([5, 6, 7], [])])
    loss = model(**batch.arguments(), fused_lm_head=True).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(gradient.abs().sum() == 0 for gradient in gradients(model).values())


def test_other_calls_of_the_model_are_unchanged() -> None:
    model = tiny_model()
    reference = twin(model)
    install_causal(model)
    batch = padded(ROWS["ragged"])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    is_real = batch.attention_mask.bool()
    assert relative(model(**inputs).logits[is_real], reference(**inputs).logits[is_real]) < 1e-5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1], [1, 0, 1, 1]], "row 1 of the batch has padding between its tokens"),
        ([[0, 1, 0, 1], [1, 1, 1, 1]], "row 0 of the batch has padding between its tokens"),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], "row 1 of the batch has no real token"),
    ],
)
def test_a_mask_with_holes_is_refused(mask: list[list[int]], message: str) -> None:
    model = tiny_model()
    install_causal(model)
    ids = torch.full((2, 4), 5)
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=torch.tensor(mask), labels=ids, fused_lm_head=True)


# ---- attention that the flat path does not serve --------------------------------------------------------------------


def test_a_head_with_a_bias_is_left_to_trl() -> None:
    model = tiny_model("qwen2")
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2.0, 2.0, 128))
    reference = twin(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    install_causal(model)
    batch = padded(ROWS["ragged"])
    output = model(**batch.arguments(), fused_lm_head=True)
    assert relative(output.log_probs[output.label_mask], plain(reference, batch).logprobs) < 1e-5


# ---- one scalar head ------------------------------------------------------------------------------------------------


def _plain_score(model: Any, ids: list[int]) -> torch.Tensor:
    """The head on the last state of one row by itself: no batch, no padding."""
    states = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return model.score(states[0, -1])[0]


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_stands_at_the_last_real_token(architecture: str, side: str, adapter: AdapterConfig) -> None:
    model = _with_adapter(tiny_scorer(architecture), adapter, TaskType.SEQ_CLS)
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
    _assert_same_gradients(model, reference)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}], ids=["flat", "sliding window"])
def test_the_batch_never_changes_a_score(changes: dict[str, Any]) -> None:
    model = tiny_scorer("mistral", **changes)
    install_scalar(model)
    rows = ROWS["ragged"] + ROWS["one-token completions"]
    batch = padded(rows, side="left", extra=4)
    together = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    alone = [
        model(input_ids=torch.tensor([[*p, *a]]), attention_mask=torch.ones(1, len(p) + len(a))).logits for p, a in rows
    ]
    assert relative(together, torch.cat(alone)) < 1e-5


def test_the_offset_is_subtracted_from_every_score() -> None:
    model = tiny_scorer()
    install_scalar(model)
    batch = padded(ROWS["ragged"])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    before = model(**inputs).logits
    model.score_offset.fill_(0.75)
    close(model(**inputs).logits, before - 0.75, atol=1e-6)


def test_a_stream_and_a_padded_batch_get_the_same_scores() -> None:
    model = tiny_scorer()
    install_scalar(model)
    rows = [[*prompt, *answer] for prompt, answer in ROWS["ragged"]]
    batch = padded(ROWS["ragged"])
    from_batch = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    from_stream = scalar_scores(model, stream(rows, torch.device("cpu")))
    assert torch.equal(from_stream, from_batch)


def test_pad_ids_at_the_end_of_a_row_count_as_the_mask_says() -> None:
    """The score of a row whose last real token is the pad token stands there, not before it."""
    model = tiny_scorer()
    install_scalar(model)
    with_end, without = torch.tensor([[5, 6, PAD]]), torch.tensor([[5, 6, 9]])
    mask = torch.ones(1, 3)
    score = model(input_ids=with_end, attention_mask=mask).logits
    expected = _plain_score(twin(tiny_scorer()), [5, 6, PAD])
    assert relative(score[0, 0], expected) < 1e-5
    assert not torch.equal(score, model(input_ids=without, attention_mask=mask).logits)


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_under_autocast_gradients_stay_close_to_those_of_the_plain_forward(
    architecture: str, adapter: AdapterConfig
) -> None:
    """Float32 weights, products in bfloat16: how a stage trains by default."""
    model = _with_adapter(tiny_model(architecture), adapter)
    reference = twin(model)
    install_causal(unwrapped(model))
    batch = padded(ROWS["pairs of one prompt"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch.arguments(), fused_lm_head=True).loss
    loss.backward()
    expected = plain(reference, batch).loss
    expected.backward()
    assert relative(loss, expected) < 0.02
    model_gradients, reference_gradients = gradients(model), gradients(reference)
    for name in ("q_proj", "v_proj", "down_proj"):
        of_model, of_reference = (
            torch.cat([g.flatten() for n, g in by_name.items() if name in n])
            for by_name in (model_gradients, reference_gradients)
        )
        assert relative(of_model, of_reference) < 0.15, name
