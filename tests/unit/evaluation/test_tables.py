"""The tables of an evaluation: an arm by itself, tasks and samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from alignment.core.errors import NonFiniteError
from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message
from alignment.evaluation.arm_labels import labels
from alignment.evaluation.arms import Answer, Answered, TokenSum
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.tables import arm_result, by_task, refuse_not_finite, samples
from alignment.records.evaluation import ArmResult
from alignment.records.interval import Interval

INTERVALS = Intervals(samples=500, seed=3)


def answered(number: int) -> Answered:
    """Two answers to each of so many prompts; the second has three more words, and its end is missing."""
    answers = [
        answer
        for index in range(number)
        for answer in (
            Answer(ids=[index, 2], text=f"answer {index}", ended=True),
            Answer(ids=[index, 3], text=f"I can't answer {index} so", ended=False),
        )
    ]
    return Answered(
        answers=answers, logprobs=[-1.0] * len(answers), references=[None] * number, seconds=2.0, per_prompt=2
    )


def row_of(arm: Answered, *, log_ratios: list[float] | None = None, **scores: list[float]) -> ArmResult:
    return arm_result(
        "stage:dpo",
        arm,
        label="dpo",
        scores=scores,
        rewards=None,
        log_ratios=log_ratios,
        win_rate=None,
        intervals=INTERVALS,
    )


def test_a_row_says_how_many_answers_differ_and_ended() -> None:
    """Of two samples a prompt, the first answers are compared with each other, and both have words and an end."""
    first, seconds = answered(1).answers[0], answered(4).answers[1::2]
    arm = replace(answered(4), answers=[answer for second in seconds for answer in (first, second)])
    row = row_of(arm, log_ratios=[1.0, 3.0, 3.0, 1.0] * 2, brevity=[0.2] * 4)
    assert row.label == "dpo"
    assert row.metrics == {"brevity": INTERVALS.of([0.2] * 4)}
    assert row.distinct == 0.25
    assert row.ended == row.refusals == INTERVALS.of([0.5] * 4)
    assert row.words == Interval(mean=3.5, low=3.5, high=3.5)
    assert (row.reward, row.loss, row.perplexity) == (None, None, None)
    assert row.greedy_log_ratio is not None
    assert row.greedy_log_ratio.mean == pytest.approx(2.0)
    assert list(row.all_metrics) == ["brevity", "words", "greedy_log_ratio", "refusals", "distinct", "ended"]


def test_the_loss_is_a_mean_over_all_reference_tokens_and_its_interval_over_prompts() -> None:
    """Answers of 2 and 6 tokens: (3 + 3) / 8 nats per token, not the mean of 1.5 and .5; no row without one counts."""
    sums = [TokenSum(logprob=-3.0, tokens=2), None, TokenSum(logprob=-3.0, tokens=6)]
    row = row_of(replace(answered(3), references=sums))
    assert row.loss is not None
    assert row.perplexity is not None
    assert (row.loss.mean, row.loss.low, row.loss.high) == pytest.approx((0.75, 0.5, 1.5))
    assert row.perplexity.mean == pytest.approx(math.exp(0.75))


def test_labels_are_short_where_they_stay_different() -> None:
    arms = ["base", "stage:dpo", "path:/models/tiny", "path:/a/twin", "path:/b/twin", "hub:org/name@main"]
    assert list(labels(arms).values()) == ["base", "dpo", "tiny", "path:/a/twin", "path:/b/twin", "hub:org/name@main"]


def test_tasks_are_averaged_by_themselves_and_every_answer_is_kept() -> None:
    rows = [
        HeldOutPrompt(messages=(Message(role="user", content=task),), task=task, id=str(number))
        for number, task in enumerate(["answer", "extract", "answer"])
    ]
    scores = [0.0, 0.25, 1.0]
    assert by_task(rows, {"base": scores}) == {"answer": {"base": 0.5}, "extract": {"base": 0.25}}
    stored = samples(rows, {"base": answered(3)}, {"base": {"brevity": scores}})
    assert [sample.answers["base"].scores for sample in stored] == [{"brevity": score} for score in scores]
    assert stored[1].messages == [{"role": "user", "content": "extract"}]
    assert (stored[1].answers["base"].text, stored[1].answers["base"].further) == ("answer 1", ["I can't answer 1 so"])


def test_characters_are_words_in_scripts_without_spaces() -> None:
    answers = [Answer(ids=[5, 2], text=text, ended=True) for text in ("今天休息", "Closed today, sorry.", "Ganz zu.")]
    assert row_of(replace(answered(3), answers=answers, per_prompt=1)).words.mean == pytest.approx(3.0)


def test_what_a_prompt_has_beside_its_turns_is_kept() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    question = HeldOutPrompt(
        messages=(Message(role="user", content="Which?"),), choices=("This.", "That."), right=0, tools=(tool,)
    )
    [stored] = samples([question], {"base": answered(1)}, {"base": {"brevity": [1.0]}})
    assert (stored.choices, stored.tools) == (["This.", "That."], [tool])


@pytest.mark.parametrize(
    ("figure", "changes"),
    [
        ("reward", {"rewards": [1.0, math.nan]}),
        ("log-ratio", {"log_ratios": [math.inf, 0.0]}),
        ("loss", {"logprob": math.nan}),
        ("loss", {"logprob": -math.inf}),
        ("perplexity", {"logprob": -8000.0}),
    ],
)
def test_a_figure_that_is_no_number_ends_the_evaluation_and_is_named(figure: str, changes: dict[str, Any]) -> None:
    def look(*, logprob: float = -20.0, rewards: Any = None, log_ratios: Any = None) -> None:
        arm = replace(answered(2), references=[TokenSum(logprob=logprob, tokens=10), None])
        refuse_not_finite("stage:dpo", arm, rewards=rewards, log_ratios=log_ratios)

    look(rewards=[1.0, 2.0])
    with pytest.raises(NonFiniteError, match=f"the {figure} of stage:dpo is .* on 1 of"):
        look(**changes)
