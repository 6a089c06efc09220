"""Prompts read once: texts behind them are worth, and answers are, what they are behind prompts read anew."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

from alignment.models.forward import flat
from alignment.models.forward import shared_prompts as reading_module
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, answer_batch, generate, reading_order
from alignment.models.forward.rows import Segment, behind, stream
from alignment.models.forward.shared_prompts import can_read, read
from tests.oracles import logprobs as oracle
from tests.tiny import ARCHITECTURES, tiny_model
from tests.unit.models.conftest import CPU

START = list(range(10, 30))
PROMPTS = [[*START, 5, 6], [*START, 5, 6], [*START, 7], [9, 4, 4, 8, 8], [3]]
"""Two alike, three with a beginning that is long enough to be computed once, and one of a single token."""
TEXTS = [[[7, 8, 2], [9]], [[2]], [], [[5, 5, 5, 5, 2], [6, 2], [6, 2]], [[4, 2]]]


def _readable(architecture: str = "llama") -> torch.nn.Module:
    model = tiny_model(architecture)
    use_flat_attention(model)
    return model


@pytest.mark.parametrize(
    ("tokens", "multiple", "threads"), [(1, 1, 1), (23, 1, 1), (1000, 1, 1), (23, 16, 1), (1000, 64, 1), (46, 1, 2)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_are_worth_what_the_whole_row_says(
    architecture: str, tokens: int, multiple: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt or text at a time, some, and all at once, with or without filling, and on two threads."""
    torch.set_num_threads(threads)
    monkeypatch.setattr(reading_module, "READ_TOKENS", tokens)
    monkeypatch.setattr(flat, "_multiple", lambda _: multiple)
    plain, model = tiny_model(architecture), _readable(architecture)
    logprobs = read(model, PROMPTS).logprobs(model, TEXTS)
    assert [len(of_prompt) for of_prompt in logprobs] == [len(of_prompt) for of_prompt in TEXTS]
    for prompt, texts, sums in zip(PROMPTS, TEXTS, logprobs, strict=True):
        for text, total in zip(texts, sums, strict=True):
            with torch.no_grad():
                logits = plain(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1].tolist()
            terms = [oracle.log_softmax(row)[token] for row, token in zip(logits, text, strict=True)]
            assert total == pytest.approx(math.fsum(terms), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("tokens", "multiple"), [(1, 1), (23, 1), (1000, 1), (23, 16), (1000, 64)])
def test_answers_are_the_same_as_without_a_reading(tokens: int, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "READ_TOKENS", tokens)
    monkeypatch.setattr(flat, "_multiple", lambda _: multiple)
    model = _readable()
    prompts = [PROMPTS[i] for i in reading_order(PROMPTS)]
    uniforms = torch.rand(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampling = Sampling(temperature=1.0, uniforms=uniforms)
    # Padded, since its attention is transformers' own.
    plain = generate(tiny_model(), prompts, max_new_tokens=9, end_ids=[2], batch_size=5, sampling=sampling)
    options = {"max_new_tokens": 9, "end_ids": [2], "uniforms": uniforms}
    assert answer_batch(model, prompts, **options, reading=read(model, prompts)) == plain
    assert len({tuple(answer) for answer in plain}) > 2


@pytest.mark.parametrize(
    ("lengths", "limit", "batches"),
    [
        ([12] * 8, 40, [1] * 8),  # together no more than the limit at once
        ([10] * 3, 40, [3]),  # what cannot be divided evenly
        ([6] * 5, 1 << 14, [3, 2]),  # few tokens
    ],
)
def test_two_threads_divide_what_they_read(
    lengths: list[int], limit: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "READ_TOKENS", limit)
    torch.set_num_threads(2)
    threads: list[str] = []
    compute = reading_module.trunk_states

    def watched(*inputs: Any, **options: Any) -> torch.Tensor:
        threads.append(threading.current_thread().name.partition("_")[0])
        return compute(*inputs, **options)

    monkeypatch.setattr(reading_module, "trunk_states", watched)
    reading = read(_readable(), [[number] * length for number, length in enumerate(lengths, start=3)])
    assert [len(batch.rows.lengths) for batch in reading.batches] == batches
    assert set(threads) == {"MainThread" if len(batches) == 1 else "part"}


def test_models_whose_attention_is_not_flat_or_whose_logits_are_changed_cannot_read() -> None:
    model = _readable()
    assert can_read(model)  # type: ignore[arg-type]
    model.config.logit_scale = 3.0
    assert not can_read(model)  # type: ignore[arg-type]
    assert not can_read(tiny_model())
    with pytest.raises(ValueError, match="cannot return the keys and values of a stream"):
        read(tiny_model(), PROMPTS)


def test_a_text_goes_on_where_its_row_ends() -> None:
    earlier = stream([[*START, 1, 2], [*START, 3], [5, 6]], CPU)  # 22 + 1 + 2 tokens
    rows = behind(earlier, [1, 1, 2], [[7, 8], [9], [4, 4, 4]])
    assert rows.input_ids.tolist() == [7, 8, 9, 4, 4, 4]
    assert rows.position_ids.tolist() == [21, 22, 21, 2, 3, 4]
    shared = ((-25, -5), (-3, -2))
    assert rows.segments == (
        Segment(own=(0, 2), before=shared),
        Segment(own=(2, 3), before=shared),
        Segment(own=(3, 6), before=((-2, 0),)),
    )
    assert rows.index.tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    assert rows.is_real.sum(-1).tolist() == [2, 1, 3]
    assert rows.lengths == (23, 22, 5)
    inside = stream([[*START, 1, 2], [*START, 1]], CPU)
    assert behind(inside, [1], [[7]]).segments == (Segment(own=(0, 1), before=((-22, -1),)),)
