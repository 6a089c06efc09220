"""Where each token of a batch stands in the stream, which rows share a beginning, and which part computes each row."""

from __future__ import annotations

import pytest
import torch

from alignment.models.forward.divided_rows import DividedRows, divided
from alignment.models.forward.rows import FlatRows, Segment, flatten, stream
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
    """The rows of each part, read from the part's own stream."""
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


@pytest.mark.parametrize("rows", ROWS)
def test_every_token_is_found_again(rows: str) -> None:
    whole = stream([[*prompt, *answer] for prompt, answer in ROWS[rows]], CPU)
    division = divided(whole)
    if division is not None:
        _assert_same_tokens(whole, division)
