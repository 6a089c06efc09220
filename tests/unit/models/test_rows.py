"""Where each token of a batch stands in the stream, and which rows share a beginning."""

from __future__ import annotations

import pytest
import torch

from alignment.models.forward.rows import Segment, flatten, stream
from tests.unit.models.conftest import ROWS, padded

CPU = torch.device("cpu")
START = list(range(10, 30))
"""Twenty tokens: long enough to be shared."""


def test_rows_that_have_nothing_in_common_stand_one_after_the_other() -> None:
    rows = stream([[7, 8, 9], [5, 6]], CPU)
    assert rows.input_ids.tolist() == [7, 8, 9, 5, 6]
    assert rows.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert rows.segments == (Segment(own=(0, 3), before=()), Segment(own=(3, 5), before=()))
    assert rows.index.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert rows.ends.tolist() == [2, 4]


def test_a_common_beginning_stands_once() -> None:
    rows = stream([[*START, 1, 2], [*START, 1, 3, 4], [*START, 5]], CPU)
    assert rows.input_ids.tolist() == [*START, 1, 2, 3, 4, 5]
    assert rows.position_ids.tolist() == [*range(22), 21, 22, 20]
    assert [segment.own for segment in rows.segments] == [(0, 22), (22, 24), (24, 25)]
    assert [segment.before for segment in rows.segments] == [(), ((0, 21),), ((0, 20),)]
    assert rows.ends.tolist() == [21, 23, 24]


def test_what_a_row_shares_may_itself_be_shared() -> None:
    rows = stream([[*START, 1], [*START, 2, 3, 4], [*START, 2, 3, 5]], CPU)
    assert rows.segments[2] == Segment(own=(24, 25), before=((0, 20), (21, 23)))


def test_the_same_row_twice_is_computed_once() -> None:
    rows = stream([[*START, 1], [*START, 1]], CPU)
    assert len(rows.input_ids) == 21
    assert rows.ends.tolist() == [20, 20]


def test_a_short_beginning_is_not_shared() -> None:
    assert len(stream([[*START[:15], 1], [*START[:15], 2]], CPU).input_ids) == 32


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


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 of the batch has no real token"):
        stream([[1], []], CPU)


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
