"""What is called forgotten: the arithmetic by hand, and both sides of each limit."""

from __future__ import annotations

import json
import math

import pytest

from alignment.core.typed_json import to_json
from alignment.data.records import PlainText, Question
from alignment.data.turns import Message
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.forgetting_measures import Asked, headlines, is_right, question_rows, table, text_rows
from alignment.evaluation.general import Measured
from alignment.evaluation.rates import paired_share_interval
from alignment.records.forgetting import Forgetting, Limits
from tests.oracles.close import close

INTERVALS = Intervals(samples=200, seed=0)
ASKED = Asked(
    texts=[PlainText(text="A", id="t1"), PlainText(text="B", id="t2")],
    tokens=[10, 30],
    questions=[
        Question(
            messages=(Message(role="user", content=f"Which, {number}?"),), choices=("x", "y"), right=0, id=str(number),
            task="even" if number % 2 == 0 else "odd",
        )
        for number in range(10)
    ],
)  # fmt: skip


def _measured(nats: list[float], right: int) -> Measured:
    """So many questions right, the first ones."""
    return Measured(nats=nats, scores=[[0.0, -1.0] if index < right else [-1.0, 0.0] for index in range(10)])


def _forgetting(after: Measured, *, rise: float | None = 0.2, drop: float | None = 0.1) -> Forgetting:
    arms = {"base": _measured([20.0, 60.0], 6), "stage:sft": after}
    return table(arms, ASKED, limits=Limits(perplexity_rise=rise, ability_drop=drop), intervals=INTERVALS)


def test_perplexity_is_that_of_all_tokens_together_and_ability_a_share_of_questions() -> None:
    forgetting = _forgetting(_measured([25.0, 61.0], 5))
    base, arm = forgetting.arms
    assert (forgetting.num_texts, forgetting.num_tokens, forgetting.num_questions) == (2, 40, 10)
    close([base.nats, base.perplexity, base.ability], [2.0, math.exp(2.0), 0.6])
    close([arm.nats, arm.perplexity, arm.ability], [86 / 40, math.exp(86 / 40), 0.5])
    close([arm.rise.mean, arm.drop.mean], [math.exp(86 / 40) / math.exp(2.0) - 1, 0.1])
    # of two texts drawn with replacement, both are the one or both the other at the least
    close([arm.rise.low, arm.rise.high], [math.expm1(1 / 30), math.expm1(5 / 10)])
    assert base.tasks == {"even": 0.6, "odd": 0.6}
    assert arm.tasks == {"even": 0.6, "odd": 0.4}
    assert base.rise is base.drop is None
    assert headlines(forgetting) == {
        "passed": 1.0,
        "perplexity/base": base.perplexity,
        "ability/base": 0.6,
        "perplexity/sft": arm.perplexity,
        "ability/sft": 0.5,
    }


@pytest.mark.parametrize("right", [6, 0, 10])
def test_the_drop_has_the_interval_of_two_shares(right: int) -> None:
    """With equal answers every resample of the questions has the same drop, which would look certain."""
    _, arm = _forgetting(_measured([20.0, 60.0], right)).arms
    assert arm.drop == paired_share_interval(max(6 - right, 0), max(right - 6, 0), 10)


@pytest.mark.parametrize(("share", "passes"), [(0.199, True), (0.201, False), (-0.5, True)])
def test_a_rise_trips_beyond_its_limit_only(share: float, passes: bool) -> None:
    more = math.log(1 + share)
    forgetting = _forgetting(_measured([20.0 + 10 * more, 60.0 + 30 * more], 6))
    assert forgetting.passed is forgetting.arms[1].passed is passes
    assert bool(forgetting.arms[1].reasons) is not passes
    if not passes:
        assert forgetting.arms[1].reasons == [
            "perplexity of general text is 20.1% higher (20.1% to 20.1%); 20.0% is allowed"
        ]
        assert headlines(forgetting)["passed"] == 0.0


@pytest.mark.parametrize(("right", "passes"), [(5, True), (4, False), (10, True)])
def test_a_drop_trips_beyond_its_limit_only(right: int, passes: bool) -> None:
    forgetting = _forgetting(_measured([20.0, 60.0], right))
    assert forgetting.passed is passes
    if not passes:
        (reason,) = forgetting.arms[1].reasons
        assert reason.startswith("20.0% fewer questions are answered right (")
        assert reason.endswith("); 10.0% is allowed")


def test_a_limit_of_nothing_lets_an_unchanged_policy_pass() -> None:
    assert _forgetting(_measured([20.0, 60.0], 6), rise=0.0, drop=0.0).passed is True


def test_without_limits_nothing_is_judged() -> None:
    forgetting = _forgetting(_measured([2e5, 6e5], 0), rise=None, drop=None)
    assert (forgetting.judged, forgetting.passed) == (False, True)
    assert "passed" not in headlines(forgetting)
    forgetting = _forgetting(_measured([2e5, 6e5], 0), rise=None)
    assert (forgetting.judged, len(forgetting.arms[1].reasons)) == (True, 1), "the other limit still counts"


def test_who_finds_all_choices_alike_knows_nothing() -> None:
    question = ASKED.questions[0]
    assert is_right(question, [0.0, -0.1])
    assert not is_right(question, [0.0, 0.0])
    assert not is_right(question, [-0.1, 0.0])


def test_a_ruined_policy_has_figures_that_json_holds() -> None:
    forgetting = _forgetting(_measured([2e5, 6e5], 0))
    assert forgetting.passed is False
    assert "Infinity" not in json.dumps(to_json(forgetting))


def test_texts_and_questions_are_told_one_by_one() -> None:
    arms = {"base": _measured([20.0, 60.0], 6), "stage:sft": _measured([25.0, 61.0], 5)}
    assert text_rows(arms, ASKED)[1] == {"id": "t2", "tokens": 30, "nats": {"base": 60.0, "stage:sft": 61.0}}
    row = question_rows(arms, ASKED)[5]
    assert (row["id"], row["task"], row["answer"]) == ("5", "odd", "x")
    assert row["right"] == {"base": True, "stage:sft": False}
    assert row["scores"]["stage:sft"] == [-1.0, 0.0]
