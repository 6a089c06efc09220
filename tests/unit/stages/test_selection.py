"""Which of a prompt's answers become rows, and with which columns."""

from __future__ import annotations

import pytest
import torch

from alignment.data.records import Prompt
from alignment.data.turns import Message
from alignment.stages.sample.config import SampleConfig, Select
from alignment.stages.sample.row_making import OfPrompt, rows_of_prompt
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


def candidate(text: str, score: float = 0.0, *, ended: bool = True) -> Candidate:
    return Candidate(text=text, score=score, ended=ended)


BY_ANSWER = {0: 1.0, 1: 3.0, 2: 0.5, 3: 3.0}


@pytest.mark.parametrize(
    ("every", "min_margin", "expected"),
    [
        (False, 2.5, [(1, 2)]),
        (False, 2.6, []),
        (True, 0.0, [(1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        (True, 2.0, [(1, 0), (1, 2), (3, 0), (3, 2)]),
    ],
)
def test_pairs_differ_by_the_margin_and_the_better_answer_is_first(
    every: bool, min_margin: float, expected: list[tuple[int, int]]
) -> None:
    assert pairs(BY_ANSWER, every=every, min_margin=min_margin) == expected


def test_equal_scores_are_no_pair_and_have_no_label() -> None:
    tied = {0: 0.1, 1: 0.1, 2: 0.1}  # the mean of these is rounded to more than 0.1
    assert pairs(tied, every=True, min_margin=0.0) == pairs({0: 1.0}, every=False, min_margin=0.0) == []
    assert labels(tied, None) == labels({}, None) == {}
    assert [is_tied(scores) for scores in (tied, {0: 0.1}, BY_ANSWER)] == [True, False, False]


def float32(value: float) -> float:
    """As scores come from tensors."""
    return torch.tensor(value, dtype=torch.float32).item()


@pytest.mark.parametrize("threshold", [0.0, 0.7, 2.5, -0.3, 1234.567])
def test_a_score_on_the_threshold_reaches_it_whatever_it_was_rounded_to(threshold: float) -> None:
    scores = {0: float32(threshold), 1: float32(threshold - 0.01)}
    assert labels(scores, threshold) == {0: True, 1: False}
    assert best({0: scores[0]}, threshold) == 0
    assert best({1: scores[1]}, threshold) is None


@pytest.mark.parametrize("better", [0.2, 0.3, 0.7, 1.0])
def test_scores_that_differ_by_the_margin_are_a_pair_whatever_they_were_rounded_to(better: float) -> None:
    scores = {0: float32(better), 1: float32(better - 0.1)}
    assert pairs(scores, every=True, min_margin=0.1) == [(0, 1)]
    assert pairs(scores, every=True, min_margin=0.101) == []


def test_the_tolerance_is_that_of_rounding_and_no_more() -> None:
    assert labels({0: float32(0.9) + float32(-0.8) + float32(-0.1)}, 0.0) == {0: True}
    assert labels({0: float32(0.2), 1: float32(0.4), 2: float32(0.6)}, None) == {0: False, 2: True}
    assert pairs({0: float32(1000.0001), 1: 1000.0}, every=True, min_margin=0.001) == []


def test_empty_unended_and_repeated_answers_are_left_out() -> None:
    answers = [candidate(text) for text in ("Yes.", " ", "Yes. ", "No.")] + [candidate("No.", ended=False)]
    assert left_out(answers, ended_only=True) == {1: EMPTY, 2: REPEATED, 4: NO_END}
    assert left_out(answers, ended_only=False) == {1: EMPTY, 2: REPEATED, 4: REPEATED}
    unended_first = [candidate("No.", ended=False), candidate("No.")]
    assert left_out(unended_first, ended_only=True) == {0: NO_END}


def chosen_rows(select: Select, roles: tuple[str, ...] = ("user",), **settings: float) -> OfPrompt:
    turns = tuple(Message(role=role, content="Hi") for role in roles)
    prompt = Prompt(messages=turns, id="q1", task="greet")
    answers = [candidate("A", 1.0), candidate("B", 3.0), candidate("C", 0.0, ended=False), candidate("D", 2.0)]
    return rows_of_prompt(SampleConfig(select=select, **settings), prompt, answers)  # type: ignore[arg-type]


def test_rows_have_the_columns_of_their_format_and_the_prompt_s_labels() -> None:
    """The first of the highest scores is the best; samples are used as chosen where one pair has them so."""
    asked = {"role": "user", "content": "Hi"}
    own = {"id": "q1", "task": "greet", "messages": [asked]}
    turn = {"role": "assistant", "content": "B"}
    assert list(chosen_rows(Select.best).rows) == [{**own, "messages": [asked, turn], "score": 3.0}]
    scores = {"chosen_score": 3.0, "rejected_score": 1.0}
    assert list(chosen_rows(Select.best_worst).rows) == [{**own, "chosen": "B", "rejected": "A", **scores}]
    made = chosen_rows(Select.all_pairs)
    assert [(row["chosen"], row["rejected"]) for row in made.rows] == [("B", "D"), ("B", "A"), ("D", "A")]
    assert made.used == {1: "chosen", 3: "chosen", 0: "rejected"}
    assert list(chosen_rows(Select.labels, threshold=2.5).rows) == [
        {**own, "completion": "A", "label": False, "score": 1.0},
        {**own, "completion": "B", "label": True, "score": 3.0},
        {**own, "completion": "D", "label": False, "score": 2.0},
    ]
    assert [best(BY_ANSWER, threshold) for threshold in (None, 3.0, 3.5)] == [1, 1, None]
    assert best({}, None) is None


def test_earlier_turns_of_the_assistant_are_not_learned_again() -> None:
    (row,) = chosen_rows(Select.best, ("user", "assistant", "user")).rows
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None]
