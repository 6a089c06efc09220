"""Rows in one stream without padding, and prompts that are read once for the texts and answers behind them."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.models.forward import flat
from alignment.models.forward import shared_prompts as reading_module
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, answer_batch, generate, reading_order
from alignment.models.forward.rows import FlatRows, Segment, behind, flatten, stream
from alignment.models.forward.shared_prompts import can_read, read
from alignment.models.forward.side_by_side import DividedRows, divided
from tests.oracles import logprobs as oracle
from tests.tiny import ARCHITECTURES, tiny_model
from tests.unit.models.conftest import CPU, ROWS, padded

START = list(range(10, 30))
"""Twenty tokens: long enough to be shared."""


def test_rows_that_have_nothing_in_common_stand_one_after_the_other() -> None:
    rows = stream([[7, 8, 9], [5, 6]], CPU)
    assert rows.input_ids.tolist() == [7, 8, 9, 5, 6]
    assert rows.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert rows.segments == (Segment(own=(0, 3), before=()), Segment(own=(3, 5), before=()))
    assert rows.index.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert rows.is_real.tolist() == [[True, True, True], [True, True, False]]
    assert rows.ends.tolist() == [2, 4]
    with pytest.raises(ValueError, match="row 1 of the batch has no real token"):
        stream([[1], []], CPU)


def test_a_common_beginning_stands_once() -> None:
    rows = stream([[*START, 1, 2], [*START, 1, 3, 4], [*START, 5]], CPU)
    assert rows.input_ids.tolist() == [*START, 1, 2, 3, 4, 5]
    assert rows.position_ids.tolist() == [*range(22), 21, 22, 20]
    assert [segment.own for segment in rows.segments] == [(0, 22), (22, 24), (24, 25)]
    assert [segment.before for segment in rows.segments] == [(), ((0, 21),), ((0, 20),)]
    assert rows.ends.tolist() == [21, 23, 24]
    nested = stream([[*START, 1], [*START, 2, 3, 4], [*START, 2, 3, 5]], CPU)
    assert nested.segments[2] == Segment(own=(24, 25), before=((0, 20), (21, 23)))
    twice = stream([[*START, 1], [*START, 1]], CPU)
    assert (len(twice.input_ids), twice.ends.tolist()) == (21, [20, 20])
    too_short = START[:15]
    assert len(stream([[*too_short, 1], [*too_short, 2]], CPU).input_ids) == 32


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ROWS)
def test_every_token_is_found_where_it_is_said_to_stand(name: str, side: str, share: bool) -> None:
    batch = padded(ROWS[name], side=side, extra=1)
    rows = flatten(batch.input_ids, batch.attention_mask, share=share)
    is_real = batch.attention_mask.bool()
    assert torch.equal(rows.input_ids[rows.index[is_real]], batch.input_ids[is_real])
    assert torch.equal(rows.position_ids[rows.index[is_real]], (is_real.cumsum(-1) - 1)[is_real])
    assert rows.input_ids[rows.ends].tolist() == [(prompt + answer)[-1] for prompt, answer in ROWS[name]]
    for row, segment in enumerate(rows.segments):
        seen = torch.cat([torch.arange(*part) for part in segment.keys])
        assert torch.equal(seen, rows.index[row][is_real[row]])


@pytest.mark.parametrize(("multiple", "tokens"), [(1, 5), (5, 5), (4, 8), (64, 64)])
def test_a_filled_stream_has_the_same_rows_and_a_row_of_filling(multiple: int, tokens: int) -> None:
    rows = stream([[7, 8, 9], [5, 6]], CPU)
    filled = rows.filled_up(multiple)
    assert filled.input_ids.tolist() == [7, 8, 9, 5, 6] + [0] * (tokens - 5)
    assert filled.position_ids.shape == (tokens,)
    assert filled.segments[:2] == rows.segments
    assert [segment.own for segment in filled.segments[2:]] == [(5, tokens)] * (tokens > 5)
    assert (filled.lengths, filled.ends.tolist()) == (rows.lengths, [2, 4])
    assert torch.equal(filled.index, rows.index)


def _row(number: int, length: int) -> list[int]:
    return [1000 * (number + 1) + column for column in range(length)]


def _parts(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]] | None:
    division = divided(stream(rows, CPU))
    if division is None:
        return None
    first, second = (
        [part.input_ids[index[real]].tolist() for index, real in zip(part.index, part.is_real, strict=True)]
        for part in division.parts
    )
    return first, second


def _assert_same_tokens(rows: FlatRows, division: DividedRows) -> None:
    joined = torch.cat([part.input_ids for part in division.parts])
    positions = torch.cat([part.position_ids for part in division.parts])
    assert joined[division.source].tolist() == rows.input_ids.tolist()
    assert positions[division.source].tolist() == rows.position_ids.tolist()


def test_rows_of_unequal_lengths_are_balanced_and_keep_their_order() -> None:
    rows = [_row(number, length) for number, length in enumerate((10, 60, 30, 40))]
    assert _parts(rows) == ([rows[0], rows[1]], [rows[2], rows[3]])


def test_rows_are_not_divided_where_one_part_would_have_most_of_the_work() -> None:
    assert _parts([_row(0, 50)]) is None
    assert _parts([_row(0, 70), _row(1, 30)]) is None
    assert _parts([_row(0, 55), _row(1, 45)]) == ([_row(0, 55)], [_row(1, 45)])
    prompt = _row(0, 400)
    assert _parts([[*prompt, *_row(number, 20)] for number in range(1, 5)]) is None


@pytest.mark.parametrize(("share", "tokens"), [(True, 20 + 2 * 40), (False, 2 * (20 + 40))])
def test_a_turn_that_all_rows_share_is_computed_in_both_parts(share: bool, tokens: int) -> None:
    whole = stream([[*START, *_row(number, 40)] for number in range(4)], CPU, share=share)
    division = divided(whole)
    assert division is not None
    assert [len(part.input_ids) for part in division.parts] == [tokens, tokens]
    assert any(segment.before for part in division.parts for segment in part.segments) is share
    _assert_same_tokens(whole, division)


READING_START = list(range(10, 30))
PROMPTS = [[*READING_START, 5, 6], [*READING_START, 5, 6], [*READING_START, 7], [9, 4, 4, 8, 8], [3]]
"""Two alike, three with a beginning that is long enough to be computed once, and one of a single token."""
TEXTS = [[[7, 8, 2], [9]], [[2]], [], [[5, 5, 5, 5, 2], [6, 2], [6, 2]], [[4, 2]]]


def _readable(architecture: str = "llama") -> torch.nn.Module:
    model = tiny_model(architecture)
    use_flat_attention(model)
    return model


@pytest.mark.parametrize(("tokens", "multiple", "threads"), [(1, 1, 1), (1000, 1, 1), (23, 16, 1), (46, 1, 2)])
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


def test_models_whose_attention_is_not_flat_or_whose_logits_are_changed_cannot_read() -> None:
    model = _readable()
    assert can_read(model)  # type: ignore[arg-type]
    model.config.logit_scale = 3.0
    assert not can_read(model)  # type: ignore[arg-type]
    assert not can_read(tiny_model())
    with pytest.raises(ValueError, match="cannot return the keys and values of a stream"):
        read(tiny_model(), PROMPTS)


def test_a_text_goes_on_where_its_row_ends() -> None:
    earlier = stream([[*READING_START, 1, 2], [*READING_START, 3], [5, 6]], CPU)  # 22 + 1 + 2 tokens
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
    inside = stream([[*READING_START, 1, 2], [*READING_START, 1]], CPU)
    assert behind(inside, [1], [[7]]).segments == (Segment(own=(0, 1), before=((-22, -1),)),)
