"""Which of a prompt's answers become rows."""

from __future__ import annotations

import struct

import pytest

from alignment.data.records import Prompt
from alignment.data.turns import Message
from alignment.stages.sample.config import SampleConfig, Select
from alignment.stages.sample.row_making import rows_of_prompt
from alignment.stages.sample.selection import (
    EMPTY,
    NO_END,
    REPEATED,
    Candidate,
    best,
    is_tied,
    labels,
    left_out,
    pairs,
)

SCORES = {0: 1.0, 1: 3.0, 2: 0.5, 3: 3.0}
ASKED = {"role": "user", "content": "Hi"}


def candidate(text: str, score: float = 0.0, *, ended: bool = True) -> Candidate:
    return Candidate(text=text, score=score, ended=ended)


def test_the_best_is_the_first_of_the_highest_scores() -> None:
    assert best(SCORES, None) == 1
    assert best(SCORES, 3.0) == 1
    assert best(SCORES, 3.5) is None
    assert best({}, None) is None


@pytest.mark.parametrize(
    ("every", "min_margin", "expected"),
    [
        (False, 0.0, [(1, 2)]),
        (False, 2.5, [(1, 2)]),
        (False, 2.6, []),
        (True, 0.0, [(1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        (True, 2.0, [(1, 0), (1, 2), (3, 0), (3, 2)]),
    ],
)
def test_pairs_differ_by_the_margin_and_the_better_answer_is_first(
    every: bool, min_margin: float, expected: list[tuple[int, int]]
) -> None:
    assert pairs(SCORES, every=every, min_margin=min_margin) == expected


def test_equal_scores_are_no_pair_and_have_no_label() -> None:
    tied = {0: 0.1, 1: 0.1, 2: 0.1}  # the mean of these is rounded to more than 0.1
    assert pairs(tied, every=True, min_margin=0.0) == pairs({0: 1.0}, every=False, min_margin=0.0) == []
    assert labels(tied, None) == labels({}, None) == {}
    assert is_tied(tied)
    assert not is_tied({0: 0.1})
    assert not is_tied(SCORES)


def test_labels_are_above_the_threshold_or_the_mean() -> None:
    assert labels({0: 1.0, 1: 2.0, 2: 3.0}, None) == {0: False, 2: True}
    assert labels({0: float32(0.2), 1: float32(0.4), 2: float32(0.6)}, None) == {0: False, 2: True}
    assert labels({0: 1.0, 1: 2.0, 2: 3.0}, 2.0) == {0: False, 1: True, 2: True}
    assert labels({0: 1.0, 1: 1.0}, 1.0) == {0: True, 1: True}


def float32(value: float) -> float:
    """As scores come from tensors."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.35, 0.7, 0.9, 0.95, 0.99, 2.5, -0.3, 1234.567])
def test_a_score_on_the_threshold_reaches_it_whatever_it_was_rounded_to(threshold: float) -> None:
    scores = {0: float32(threshold), 1: float32(threshold - 0.01)}
    assert labels(scores, threshold) == {0: True, 1: False}
    assert best({0: scores[0]}, threshold) == 0
    assert best({1: scores[1]}, threshold) is None


@pytest.mark.parametrize("better", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_scores_that_differ_by_the_margin_are_a_pair_whatever_they_were_rounded_to(better: float) -> None:
    scores = {0: float32(better), 1: float32(better - 0.1)}
    assert pairs(scores, every=True, min_margin=0.1) == [(0, 1)]
    assert pairs(scores, every=True, min_margin=0.101) == []


def test_the_tolerance_is_that_of_rounding_and_no_more() -> None:
    assert labels({0: float32(0.9) + float32(-0.8) + float32(-0.1)}, 0.0) == {0: True}
    assert pairs({0: float32(1000.0001), 1: 1000.0}, every=True, min_margin=0.001) == []


def test_empty_unended_and_repeated_answers_are_left_out() -> None:
    answers = [candidate(text) for text in ("Yes.", " ", "Yes. ", "No.")] + [candidate("No.", ended=False)]
    assert left_out(answers, ended_only=True) == {1: EMPTY, 2: REPEATED, 4: NO_END}
    assert left_out(answers, ended_only=False) == {1: EMPTY, 2: REPEATED, 4: REPEATED}
    unended_first = [candidate("No.", ended=False), candidate("No.")]
    assert left_out(unended_first, ended_only=True) == {0: NO_END}


def rows(select: Select, **settings: float) -> list[dict[str, object]]:
    prompt = Prompt(messages=(Message(role="user", content="Hi"),), id="q1", task="greet")
    answers = [candidate("A", 1.0), candidate("B", 3.0), candidate("C", 0.0, ended=False), candidate("D", 2.0)]
    made = rows_of_prompt(SampleConfig(select=select, **settings), prompt, answers)  # type: ignore[arg-type]
    return [dict(row) for row in made.rows]


def test_rows_have_the_columns_of_their_format_and_the_prompt_s_labels() -> None:
    own = {"id": "q1", "task": "greet", "messages": [ASKED]}
    turn = {"role": "assistant", "content": "B"}
    assert rows(Select.best) == [{**own, "messages": [ASKED, turn], "score": 3.0}]
    scores = {"chosen_score": 3.0, "rejected_score": 1.0}
    assert rows(Select.best_worst) == [{**own, "chosen": "B", "rejected": "A", **scores}]
    assert [(row["chosen"], row["rejected"]) for row in rows(Select.all_pairs)] == [("B", "D"), ("B", "A"), ("D", "A")]
    assert rows(Select.labels, threshold=2.5) == [
        {**own, "completion": "A", "label": False, "score": 1.0},
        {**own, "completion": "B", "label": True, "score": 3.0},
        {**own, "completion": "D", "label": False, "score": 2.0},
    ]


def test_earlier_turns_of_the_assistant_are_not_learned_again() -> None:
    turns = ("user", "assistant", "user")
    prompt = Prompt(messages=tuple(Message(role=role, content=role) for role in turns))
    (row,) = rows_of_prompt(SampleConfig(select=Select.best), prompt, [candidate("A")]).rows
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None]


def test_samples_are_used_as_chosen_where_one_pair_has_them_so() -> None:
    prompt = Prompt(messages=(Message(role="user", content="Hi"),))
    answers = [candidate("A", 1.0), candidate("B", 2.0), candidate("C", 0.0)]
    made = rows_of_prompt(SampleConfig(select=Select.all_pairs), prompt, answers)
    assert made.used == {1: "chosen", 0: "chosen", 2: "rejected"}
