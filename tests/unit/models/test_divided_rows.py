"""Which rows of a stream are computed in which part, and where each token's state then is."""

from __future__ import annotations

import itertools

import pytest
import torch

from alignment.models.forward.divided_rows import DividedRows, divided
from alignment.models.forward.rows import FlatRows, stream
from tests.unit.models.conftest import ROWS

CPU = torch.device("cpu")
TURN = list(range(100, 120))
"""Twenty tokens: long enough to be shared."""


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


def test_long_rows_count_for_more_than_their_tokens() -> None:
    """Attention: 1,536 tokens cost 1536 · (768 + 1536), three times as much as 24 rows of 64 do."""
    rows = [_row(0, 1536), *(_row(number, 64) for number in range(1, 61))]
    parts = _parts(rows)
    assert parts is not None
    (alone,) = (part for part in parts if rows[0] in part)
    assert sum(map(len, alone)) < 0.45 * sum(map(len, rows))


def test_one_row_is_not_divided() -> None:
    assert _parts([_row(0, 50)]) is None


def test_a_row_that_is_most_of_the_work_is_not_divided() -> None:
    assert _parts([_row(0, 70), _row(1, 30)]) is None
    assert _parts([_row(0, 55), _row(1, 45)]) == ([_row(0, 55)], [_row(1, 45)])


def test_pairs_of_one_prompt_stay_together() -> None:
    prompts = [_row(number, length) for number, length in enumerate((40, 30, 24, 20, 18))]
    rows = [[*prompt, *answer] for prompt in prompts for answer in ([1, 2, 3], [4, 5])]
    parts = _parts(rows)
    assert parts is not None
    assert [[row[0] // 1000 for row in part] for part in parts] == [[1, 1, 4, 4], [2, 2, 3, 3, 5, 5]]


def test_a_turn_that_all_rows_share_is_computed_in_both_parts() -> None:
    rows = [[*TURN, *_row(number, 40)] for number in range(4)]
    division = divided(stream(rows, CPU))
    assert division is not None
    assert [len(part.input_ids) for part in division.parts] == [100, 100]  # 20 + 2 · 40 each
    _assert_same_tokens(stream(rows, CPU), division)


def test_the_shortest_beginnings_are_computed_twice_and_the_longer_ones_once() -> None:
    prompts = [[*TURN, *_row(number, 30)] for number in range(4)]
    rows = [[*prompt, *answer] for prompt in prompts for answer in ([1, 2, 3], [4, 5])]
    division = divided(stream(rows, CPU))
    assert division is not None
    assert [len(part.input_ids) for part in division.parts] == [90, 90]  # 20 + 2 · (30 + 3 + 2) each


def test_answers_to_one_long_prompt_are_not_divided() -> None:
    prompt = _row(0, 400)
    assert _parts([[*prompt, *_row(number, 20)] for number in range(1, 5)]) is None


@pytest.mark.parametrize("rows", ROWS)
def test_every_token_is_found_again(rows: str) -> None:
    whole = stream([[*prompt, *answer] for prompt, answer in ROWS[rows]], CPU)
    division = divided(whole)
    if division is not None:
        _assert_same_tokens(whole, division)


def test_beginnings_that_were_not_to_be_shared_are_not_shared_in_parts() -> None:
    rows = [[*TURN, *_row(number, 40)] for number in range(4)]
    division = divided(stream(rows, CPU, share=False))
    assert division is not None
    assert [len(part.input_ids) for part in division.parts] == [120, 120]
    assert not any(segment.before for part in division.parts for segment in part.segments)


def test_all_rows_are_in_one_of_the_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (12,), generator=generator).tolist()
    rows = [_row(number, length) for number, length in enumerate(lengths)]
    parts = _parts(rows)
    assert parts is not None
    assert sorted(itertools.chain(*parts)) == sorted(rows)
