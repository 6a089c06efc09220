"""Rules say of an answer's text what a reader would say."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import DataError
from alignment.rewards import verifiers
from alignment.rewards.scorers import ExactAnswer
from tests.public import PUBLIC, WRITTEN, needs_public_data
from tests.unit.rewards.conftest import answers_to, prompt

# ---- exact_answer ---------------------------------------------------------------------------------------------------

RIGHT = [
    ("The answer is 18.", "18"),
    ("#### 18", "18"),
    ("first 3, then 18", "18"),
    ("She pays $18.00!", "18"),
    ("18", "18.0"),
    ("€1,080", "1080"),
    ("1,234,567.50", "1234567.5"),
    ("It is 0018.", "18"),
    ("half of it, .5", "0.5"),
    ("so −5", "-5"),
    ("so -5", "-5"),
    ("= -5", "-5"),
    ("a loss of -$5", "-5"),
    ("a loss of $-5", "-5"),
    ("8-3=5", "5"),
    ("8-3", "3"),
    ("pages 8–3", "3"),
    ("(2)-3", "3"),
    ("x = 3 - 8", "8"),
    ("**18**", "18"),
    ("\\boxed{18}", "18"),
    ("$18$", "18"),
    ("18%", "18"),
    ("18 apples", "18"),
    ("on the 2nd", "2"),
    ("12,5", "5"),
    ("1,2345", "2345"),
    ("3/4", "4"),
    ("1\n2\n", "2"),
]
WRONG = [
    ("", "0"),
    ("eighteen", "18"),
    ("18, not 17", "18"),
    ("180", "18"),
    ("1.8", "18"),
    ("18.01", "18"),
    ("-18", "18"),
    ("18", "-18"),
    ("1,08", "108"),
    ("18e", "180"),
]


@pytest.mark.parametrize(("completion", "expected"), RIGHT)
def test_the_last_number_of_an_answer_is_read_as_a_reader_would(completion: str, expected: str) -> None:
    assert verifiers.exact_answer(completion, Decimal(expected)) == 1.0


@pytest.mark.parametrize(("completion", "expected"), WRONG)
def test_any_other_number_is_wrong(completion: str, expected: str) -> None:
    assert verifiers.exact_answer(completion, Decimal(expected)) == 0.0


def _written(value: Fraction, rng: random.Random) -> str:
    """A number with two decimals as somebody may write it, digit by digit."""
    cents = abs(value.numerator * 100 // value.denominator)
    whole, decimals = str(cents // 100), f"{cents % 100:02d}"
    if rng.random() < 0.5:
        groups = []
        while len(whole) > 3:
            groups.insert(0, whole[-3:])
            whole = whole[:-3]
        whole = ",".join([whole, *groups])
    if decimals == "00" and rng.random() < 0.5:
        text = whole
    elif decimals.endswith("0") and rng.random() < 0.5:
        text = f"{whole}.{decimals[0]}"
    else:
        text = f"{whole}.{decimals}{'0' * rng.randrange(3)}"
    currency = rng.choice(["", "", "$", "€", "£"])
    minus = rng.choice(["-", "−"]) if value < 0 else ""
    return minus + currency + text if rng.random() < 0.5 or not currency else currency + minus + text


def test_however_a_number_is_written_it_is_the_same_number() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        value = Fraction(rng.choice([rng.randrange(-(10**9), 10**9), rng.randrange(-5000, 5000) * 100]), 100)
        before = rng.choice(["The answer is ", "3 + 4 = 7, so ", "(", "#### ", ""])
        completion = before + _written(value, rng) + rng.choice([".", "", " apples.", "!", "\n", ")", "%"])
        expected = Decimal(value.numerator) / Decimal(value.denominator)
        assert verifiers.exact_answer(completion, expected) == 1.0, completion
        assert verifiers.exact_answer(completion, expected + 1) == 0.0, completion


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3 * 6 = 18\n#### 18", "18"),
        ("#### 5\n#### 1,080", "1080"),
        ("#### $18.50 each", "18.5"),
        ("#### -3", "-3"),
        ("18", "18"),
        (" $1,080. ", "1080"),
        (18, "18"),
        (-1.5, "-1.5"),
    ],
)
def test_a_row_s_number_stands_behind_the_mark_or_alone(answer: Any, expected: str) -> None:
    assert verifiers.expected_answer({"answer": answer}, where="x:1") == Decimal(expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "rows.jsonl:7: 'answer' is missing"),
        ({"answer": None}, "rows.jsonl:7: 'answer' holds no number to check against; it is None"),
        ({"answer": "3 + 4 = 7"}, "rows.jsonl:7: 'answer' holds no number to check against; it is '3 + 4 = 7'"),
        ({"answer": "7 #### seven"}, "rows.jsonl:7: 'answer' holds no number to check against; it is '7 #### seven'"),
        ({"answer": True}, "rows.jsonl:7: 'answer' holds no number to check against; it is True"),
        ({"answer": float("nan")}, "rows.jsonl:7: 'answer' holds no number to check against; it is 'nan'"),
        ({"answer": ["18"]}, "rows.jsonl:7: 'answer' holds no number to check against; it is ['18']"),
    ],
)
def test_a_row_without_a_number_to_check_against_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        ExactAnswer([prompt(answer="#### 1"), prompt(line=7, **row)])
    assert str(caught.value).splitlines()[0] == message


def test_each_answer_is_held_against_its_own_row() -> None:
    prompts = [prompt(answer="#### 1"), prompt(answer="#### 2"), prompt(answer="#### 3")]
    scorer = ExactAnswer(prompts)
    assert scorer.scores(answers_to(prompts, ["1", "1", "3"])).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "file", [WRITTEN / "sums.jsonl", pytest.param(PUBLIC / "gsm8k/test.jsonl", marks=needs_public_data)]
)
def test_rows_agree_with_themselves_and_with_the_published_extraction(file: Path) -> None:
    """The data set's authors read ``#### (\\-?[0-9\\.\\,]+)`` and drop commas (openai/grade-school-math)."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= (6 if file.parent == WRITTEN else 100)
    numbers = []
    for row in rows:
        published = re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])
        assert published is not None
        numbers.append(Decimal(published[1].replace(",", "")))
        expected = verifiers.expected_answer(row, where="test.jsonl")
        assert expected == numbers[-1], row["answer"]
        assert verifiers.exact_answer(row["answer"], expected) == 1.0, row["answer"]
    for row, other in zip(rows, [*numbers[1:], numbers[0]], strict=True):
        same = verifiers.expected_answer(row, where="test.jsonl") == other
        assert verifiers.exact_answer(row["answer"], other) == float(same)


# ---- regex, length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        (r"^<answer>.*</answer>$", "<answer>4</answer>", 1.0),
        (r"^<answer>.*</answer>$", "well, <answer>4</answer>", 0.0),
        (r"\bfour\b", "it is four.", 1.0),
        (r"(?i)FOUR", "it is four.", 1.0),
        (r"four", "", 0.0),
    ],
)
def test_a_pattern_is_found_or_not(pattern: str, completion: str, expected: float) -> None:
    assert verifiers.regex(completion, re.compile(pattern)) == expected


def test_length_is_best_at_the_target_and_nothing_beyond_twice_it() -> None:
    found = [verifiers.length(" ".join(["word"] * number), 4) for number in range(11)]
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert verifiers.length("a  b\nc\td", 4) == 1.0
