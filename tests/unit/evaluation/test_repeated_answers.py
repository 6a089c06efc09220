"""Several answers to one prompt."""

from __future__ import annotations

import itertools

import pytest

from alignment.evaluation.repeated_answers import majority_score, pass_at_k, scores_of_prompts
from alignment.rewards.rules.numbers import final_number


@pytest.mark.parametrize(("count", "right"), [(4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer(count: int, right: int) -> None:
    correct = [index < right for index in range(count)]
    for k in range(1, count + 1):
        choices = list(itertools.combinations(correct, k))
        assert pass_at_k(correct, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_needs_k_answers() -> None:
    with pytest.raises(ValueError, match="pass@3 needs at least 3 answers, and there are 2"):
        pass_at_k([True, False], 3)
    with pytest.raises(ValueError, match="pass@0"):
        pass_at_k([True, False], 0)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["18", "17", "18"], [1.0, 0.0, 1.0], 1.0),
        (["18", "17", "17"], [1.0, 0.0, 0.0], 0.0),
        (["18", "17"], [1.0, 0.0], 0.5),
        (["", "", "18"], [0.0, 0.0, 1.0], 1.0),
        (["", ""], [0.25, 0.75], 0.5),
        (["1", "2", "3", "3", "2"], [1.0, 0.4, 0.0, 0.0, 0.4], 0.2),
    ],
)
def test_the_majority(answers: list[str], scores: list[float], expected: float) -> None:
    assert majority_score(answers, scores) == pytest.approx(expected)


TEXTS = ["It is 18.", "So 1,080.00", "18", "no number", "$1080", "#### 7"]
SCORES = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("mean", [2 / 3, 1 / 3]),
        ("pass@1", [2 / 3, 1 / 3]),
        ("pass@2", [1.0, 2 / 3]),
        ("majority", [1.0, 0.5]),  # of "", 1080 and 7 none is more frequent; the empty one does not vote
    ],
)
def test_one_score_of_the_answers_to_each_prompt(aggregate: str, expected: list[float]) -> None:
    scores = scores_of_prompts(
        SCORES, list(map(final_number, TEXTS)), aggregate=aggregate, passing_score=1.0, per_prompt=3
    )
    assert scores == pytest.approx(expected)


def test_an_answer_passes_at_a_score_of_ones_own() -> None:
    scores = [0.4, 0.6, 0.2, 0.1]
    assert scores_of_prompts(scores, [""] * 4, aggregate="pass@2", passing_score=0.5, per_prompt=2) == [1.0, 0.0]
    assert scores_of_prompts(scores, [""] * 4, aggregate="pass@2", passing_score=0.2, per_prompt=2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("$1,080.00 in all", "1080"), ("-3", "-3"), ("1.50", "1.5"), ("none", ""), ("first 2, then 100", "100")],
)
def test_final_numbers_have_one_spelling(text: str, number: str) -> None:
    assert final_number(text) == number
