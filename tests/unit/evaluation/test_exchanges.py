"""Rows of several turns: which conversation each answer belongs to, and what a row's figures are made of."""

from __future__ import annotations

import pytest

from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message
from alignment.evaluation.arms import Answer, Answered, TokenSum
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.exchanges import AskedTurn, asked_turns, continued, prompts_of_answers
from alignment.evaluation.tables import arm_result, samples
from alignment.records.evaluation import Sample, TurnAnswer

INTERVALS = Intervals(samples=200, seed=1)


def row(first: str, *later: str, references: tuple[str, ...] = ()) -> HeldOutPrompt:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content=first))
    return HeldOutPrompt(messages=messages, later_turns=later, later_references=references, id=first)


ROWS = [row("a1", "a2"), row("b1"), row("c1", "c2", "c3")]


def turns_of(prompt: HeldOutPrompt) -> list[str]:
    return [message.content for message in prompt.messages[1:]]


def test_a_row_goes_on_with_the_answers_and_the_turns_behind_them() -> None:
    prompt = continued(ROWS[2], ["x", "y"])
    assert [(turn.role, turn.content) for turn in prompt.messages] == [
        ("system", "Be brief."),
        ("user", "c1"),
        ("assistant", "x"),
        ("user", "c2"),
        ("assistant", "y"),
        ("user", "c3"),
    ]
    assert continued(ROWS[1], []) is ROWS[1]
    two = row("a1", "a2", references=("second",))
    assert [continued(two, texts).reference for texts in ([], ["x"])] == ["", "second"]


def test_every_answer_is_behind_its_own_conversation() -> None:
    """Two samples a turn: the second one's later prompts hold its own earlier answers, never the first one's."""
    assert asked_turns(ROWS[:2]) == [AskedTurn(row=0, turn=0), AskedTurn(row=0, turn=1), AskedTurn(row=1, turn=0)]
    texts = ["a-1", "a-1'", "a-2", "a-2'", "b-1", "b-1'", "c-1", "c-1'", "c-2", "c-2'", "c-3", "c-3'"]
    asked = prompts_of_answers(ROWS, texts, per_prompt=2)
    assert [turns_of(prompt) for prompt in asked] == [
        ["a1"],
        ["a1"],
        ["a1", "a-1", "a2"],
        ["a1", "a-1'", "a2"],
        ["b1"],
        ["b1"],
        ["c1"],
        ["c1"],
        ["c1", "c-1", "c2"],
        ["c1", "c-1'", "c2"],
        ["c1", "c-1", "c2", "c-2", "c3"],
        ["c1", "c-1'", "c2", "c-2'", "c3"],
    ]


def answered(*texts: str, turns: list[int], per_prompt: int = 1) -> Answered:
    answers = [Answer(ids=[1], text=text, ended=True) for text in texts]
    references = [None] * (len(texts) // per_prompt)
    return Answered(
        answers=answers, logprobs=None, references=references, seconds=1.0, turns=turns, per_prompt=per_prompt
    )


def test_a_row_scores_the_mean_of_its_turns_and_its_log_ratio_is_their_sum() -> None:
    """Rows of two turns and of one: the row counts once, however many turns it has."""
    arm = answered("one two", "three", "four five six", turns=[2, 1])
    result = arm_result(
        "stage:dpo",
        arm,
        label="dpo",
        scores={"right": [1.0, 0.0, 0.25]},
        rewards=[2.0, 4.0, 6.0],
        log_ratios=[1.5, 2.0, 0.5],
        win_rate=None,
        intervals=INTERVALS,
    )
    assert result.metrics["right"].mean == pytest.approx((0.5 + 0.25) / 2)
    assert [of_turn["right"].mean for of_turn in result.by_turn] == [pytest.approx(0.625), 0.0]
    assert result.reward is not None
    assert result.reward.mean == pytest.approx((3.0 + 6.0) / 2)
    assert result.greedy_log_ratio is not None
    assert result.greedy_log_ratio.mean == pytest.approx((3.5 + 0.5) / 2)
    assert result.words is not None
    assert result.words.mean == pytest.approx((1.5 + 3.0) / 2)
    assert "by_turn" not in result.all_metrics


def test_a_turn_in_which_no_prompt_has_a_score_has_no_figure() -> None:
    """The only row of two turns has no grade, so the second turn has none."""
    result = arm_result(
        "stage:dpo",
        answered("one", "two", "three", turns=[2, 1]),
        label="dpo",
        scores={"helpful": [None, None, 7.0], "right": [1.0, 0.0, 1.0]},
        rewards=None,
        log_ratios=None,
        win_rate=None,
        intervals=INTERVALS,
    )
    assert result.metrics["helpful"].mean == 7.0
    assert [{name: mean.mean for name, mean in of_turn.items()} for of_turn in result.by_turn] == [
        {"helpful": 7.0, "right": 1.0},
        {"right": 0.0},
    ]


def test_of_samples_the_log_ratio_is_a_mean_within_each_turn_and_a_sum_over_turns() -> None:
    arm = answered(*"abcdef", turns=[2, 1], per_prompt=2)
    assert arm.sums([1.0, 3.0, 10.0, 20.0, 5.0, 7.0]) == [2.0 + 15.0, 6.0]
    assert arm.means([1.0, 3.0, 10.0, 20.0, 5.0, 7.0]) == [(2.0 + 15.0) / 2, 6.0]
    assert [[answer.text for answer in exchange] for exchange in arm.exchanges] == [["a", "c"], ["e"]]


def test_the_interval_of_the_loss_draws_whole_rows() -> None:
    """Two turns of one row are 3 + 3 nats over 2 + 6 tokens, which no resample takes apart."""
    arm = answered("x", "y", turns=[2])
    sums = [TokenSum(logprob=-3.0, tokens=2), TokenSum(logprob=-3.0, tokens=6)]
    arm = Answered(answers=arm.answers, logprobs=None, references=[*sums], seconds=1.0, turns=[2])
    loss = arm_result(
        "base", arm, label="", scores={}, rewards=None, log_ratios=None, win_rate=None, intervals=INTERVALS
    ).loss
    assert loss is not None
    assert (loss.mean, loss.low, loss.high) == (0.75, 0.75, 0.75)


def test_a_sample_holds_the_whole_exchange() -> None:
    rows = [row("a1", "a2", references=("second",)), row("b1")]
    stored = samples(rows, {"base": answered("x", "y", "z", turns=[2, 1])}, {"base": {"right": [1.0, 0.0, 0.5]}})
    first, second = stored[0].answers["base"], stored[1].answers["base"]
    assert (first.text, first.scores) == ("x", {"right": 0.5})
    assert first.turns == [TurnAnswer(text="x", scores={"right": 1.0}), TurnAnswer(text="y", scores={"right": 0.0})]
    assert (stored[0].later_turns, stored[0].later_references) == (["a2"], ["second"])
    assert (second.text, second.turns, stored[1].later_turns) == ("z", [], [])


def test_prompts_that_go_on_in_another_way_are_not_the_same() -> None:
    asked = Sample(id="a", messages=[{"role": "user", "content": "a1"}])
    assert asked.prompt != Sample(id="a", messages=asked.messages, later_turns=["a2"]).prompt
