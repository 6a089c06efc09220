"""Which arms are compared, which differences are called real, what is forgotten, and the sentences about them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from alignment.core.typed_json import to_json
from alignment.data.records import PlainText, Question
from alignment.data.turns import Message
from alignment.evaluation.conclusions import conclusions
from alignment.evaluation.forgetting_measures import (
    Chunk,
    Material,
    Measured,
    headlines,
    is_right,
    question_rows,
    table,
    text_rows,
)
from alignment.evaluation.statistics import Intervals, compare, detectable, paired_share_interval
from alignment.records.evaluation import (
    BETTER,
    NO_DIFFERENCE,
    NOTHING,
    WORSE,
    Comparison,
    Evaluation,
    Judge,
    JudgedPair,
    Metric,
)
from alignment.records.interval import Interval
from alignment.records.stages import Forgetting, Limits
from tests.oracles.close import close

INTERVALS = Intervals(samples=500, seed=3)
LOW, HIGH = [0.1, 0.2, 0.3, 0.2] * 5, [0.8, 0.9, 0.7, 0.9] * 5
SCORES = {
    "base": LOW,
    "base+prompt": LOW[::-1],
    "stage:sft": HIGH,
    "stage:dpo": [value + 0.05 for value in HIGH],
    "stage:ppo": HIGH[::-1],
}
BREVITY, ERRORS = Metric(name="brevity"), Metric(name="errors", higher_is_better=False)
LABELS = {"stage:sft": "sft", "stage:dpo": "dpo", "base": "base"}


def test_every_trained_arm_meets_the_untrained_ones_the_reference_and_the_other_trained_ones_once() -> None:
    pairs = compare({"brevity": SCORES}, reference="stage:sft", intervals=INTERVALS)
    assert sorted((pair.arm, pair.against) for pair in pairs) == sorted(
        [
            ("base+prompt", "base"),
            *((f"stage:{arm}", untrained) for arm in ("sft", "dpo", "ppo") for untrained in ("base", "base+prompt")),
            ("stage:dpo", "stage:sft"),
            ("stage:ppo", "stage:sft"),
            ("stage:ppo", "stage:dpo"),
        ]
    )
    to_base = [frozenset((pair.arm, pair.against)) for pair in compare({"brevity": SCORES}, reference="base",
                                                                       intervals=INTERVALS)]  # fmt: skip
    assert len(set(to_base)) == len(to_base)
    assert {len(pair) for pair in to_base} == {2}
    for scores in ({}, {"brevity": {"base": [0.5]}}):
        assert compare(scores, reference="stage:sft", intervals=INTERVALS) == []


def test_a_constant_gain_is_real_and_a_shuffle_or_one_of_many_is_not() -> None:
    pairs = compare({"brevity": SCORES}, reference="stage:sft", intervals=INTERVALS)
    dpo, ppo = (pair for pair in pairs if pair.against == "stage:sft")
    assert (dpo.difference, dpo.real) == (pytest.approx(0.05), True)
    assert (ppo.difference, ppo.real) == (pytest.approx(0.0), False)
    assert (ppo.low, ppo.high) == INTERVALS.of_difference(SCORES["stage:ppo"], SCORES["stage:sft"]).bounds
    assert ppo.low < 0.0 < ppo.high
    assert dpo.high - dpo.low == pytest.approx(0.0, abs=1e-9), "differences are paired: a constant gain has no width"
    rng = np.random.default_rng(0)
    base, gain = rng.normal(0.0, 1.0, 60), rng.normal(0.0, 1.0, 60)
    scores = {"total": {"base": base.tolist(), "stage:sft": (base + gain - gain.mean() + 0.29).tolist()}}
    (alone,) = compare(scores, reference="stage:sft", intervals=INTERVALS)
    for number in range(19):
        scores[f"null {number}"] = {"base": [0.0] * 60, "stage:sft": rng.normal(0.0, 1.0, 60).tolist()}
    among = compare(scores, reference="stage:sft", intervals=INTERVALS)
    (total,) = (pair for pair in among if pair.metric == "total")
    assert (len(among), alone.real, total.real) == (20, True, False)
    of_twenty = (3.0233 + 0.8416) / (1.96 + 0.8416)  # quantiles of .05 / 20 and of .05, each with a power of 80 %
    assert (total.detectable or 0.0) / (alone.detectable or 1.0) == pytest.approx(of_twenty, rel=1e-4)
    assert total.p is not None
    assert total.adjusted_p is not None
    assert total.p < 0.05 < total.adjusted_p
    assert total.interval.excludes_zero()


def test_metrics_over_other_prompts_are_one_family() -> None:
    """As tasks with other numbers of rows: each p value is that of its metric alone, and all are corrected together."""
    short = {name: values[:8] for name, values in SCORES.items() if name in ("stage:sft", "stage:dpo")}
    long = {"stage:sft": LOW, "stage:dpo": [value + 0.01 * (-1) ** index for index, value in enumerate(LOW)]}
    alone = [compare({"it": scores}, reference="stage:sft", intervals=INTERVALS)[0] for scores in (short, long)]
    together = compare({"short": short, "long": long}, reference="stage:sft", intervals=INTERVALS)
    assert [pair.p for pair in together] == [pair.p for pair in alone]
    for pair, by_arm in zip(together, (short, long), strict=True):
        differences = [own - other for own, other in zip(by_arm[pair.arm], by_arm[pair.against], strict=True)]
        assert pair.detectable == detectable(differences, comparisons=2)
    low, high = sorted(pair.p or 0.0 for pair in alone)
    assert low < high
    assert sorted(pair.adjusted_p or 0.0 for pair in together) == pytest.approx([2 * low, max(2 * low, high)])


def test_a_verdict_is_in_the_direction_of_its_metric() -> None:
    evaluation = Evaluation(metrics=[Metric(name="total"), ERRORS], primary="total")
    more = Comparison(arm="a", against="b", difference=0.5, low=0.4, high=0.7, p=0.001, adjusted_p=0.01)
    turned = more.turned()
    assert (turned.arm, turned.against, turned.difference, turned.low, turned.high) == ("b", "a", -0.5, -0.7, -0.4)
    assert [evaluation.verdict(pair) for pair in (more, turned)] == [BETTER, WORSE]
    assert [evaluation.verdict(replace(pair, metric="errors")) for pair in (more, turned)] == [WORSE, BETTER]
    assert evaluation.verdict(replace(more, adjusted_p=0.05)) == NO_DIFFERENCE


def comparison(arm: str, against: str, difference: float, *, real: bool, size: float | None) -> Comparison:
    half = abs(difference) * (0.5 if real else 2) + (0 if real else 0.1)
    low, high = difference - half, difference + half
    return Comparison(arm=arm, against=against, difference=difference, low=low, high=high, detectable=size)


GAIN = comparison("stage:sft", "base", 0.4, real=True, size=0.11)
EVEN = comparison("stage:dpo", "stage:sft", 0.01, real=False, size=0.052)
BY_CHANCE = replace(comparison("stage:dpo", "base", 0.4, real=True, size=0.1), p=0.03, adjusted_p=0.09)


@pytest.mark.parametrize(
    ("prompts", "metric", "pairs", "sentences"),
    [
        pytest.param(
            102,
            BREVITY,
            [GAIN, EVEN],
            [
                "102 prompts, by brevity: sft is better than base; dpo and sft cannot be told apart.",
                "A true difference in brevity below about 0.05 would be missed more than one time in five with this "
                "number of prompts.",
            ],
            id="told apart or not",
        ),
        pytest.param(
            102,
            BREVITY,
            [replace(BY_CHANCE, detectable=None), replace(BY_CHANCE, arm="stage:sft", detectable=None)],
            [
                "102 prompts, by brevity: dpo and base, sft and base cannot be told apart.",
                "The interval of dpo and base, sft and base excludes zero, but among 2 comparisons the difference may "
                "be due to chance.",
            ],
            id="chance among several",
        ),
        pytest.param(
            10,
            ERRORS,
            [comparison("stage:sft", "base", -4.0, real=True, size=None)],
            ["10 prompts, by errors: sft is better than base."],
            id="less is better",
        ),
        pytest.param(
            9,
            BREVITY,
            [GAIN],
            ["9 prompts, by brevity: fewer than 10 prompts, so no difference can be shown."],
            id="too few prompts",
        ),
        pytest.param(5, BREVITY, [], [], id="one arm"),
        pytest.param(
            5,
            None,
            [],
            ["5 prompts, but no metric and no judge, so no arm is called better than another."],
            id="no metric",
        ),
    ],
)
def test_sentences_say_what_an_evaluation_shows(
    prompts: int, metric: Metric | None, pairs: list[Comparison], sentences: list[str]
) -> None:
    assert conclusions(prompts, metric, pairs, None, LABELS) == sentences


def test_a_judge_has_a_sentence_that_says_where_nothing_can_be_concluded_and_what_length_explains() -> None:
    rate, even = Interval(mean=0.62, low=0.53, high=0.71), Interval(mean=0.52, low=0.41, high=0.6)
    pair = JudgedPair(arm="stage:dpo", against="stage:sft", wins=1, ties=2, losses=3, verdict="better", win_rate=rate)
    invalid = replace(pair, against="base", win_rate=None, invalid=0.4, verdict=NOTHING)
    judge = Judge(name="some-model", num_prompts=100, pairs=[pair, invalid])
    assert conclusions(100, None, [], judge, LABELS) == [
        "By some-model on 100 prompts, ties counted as half a win: dpo wins 0.62 against sft (0.53 to 0.71), better; "
        "nothing can be concluded about dpo and base (40% of the verdicts are invalid)."
    ]
    for at_equal_lengths, end in (
        (even, "better, but at equal lengths 0.52 (0.41 to 0.60), no real difference."),
        (rate, "(0.53 to 0.71), better."),
    ):
        judge = replace(judge, pairs=[replace(pair, length_controlled=at_equal_lengths)])
        (sentence,) = conclusions(100, None, [], judge, LABELS)
        assert sentence.endswith(end)


MATERIAL = Material(
    texts=[PlainText(text="A", id="t1"), PlainText(text="B", id="t2")],
    chunks=[Chunk(row=row, read=[1], scored=[2] * count) for row, count in ((0, 10), (1, 18), (1, 12))],
    choices=[],
    questions=[
        Question(
            messages=(Message(role="user", content=f"Which, {number}?"),), choices=("x", "y"), right=0, id=str(number),
            task="even" if number % 2 == 0 else "odd",
        )
        for number in range(10)
    ],
)  # fmt: skip


def measured(nats: list[float], right: int) -> Measured:
    """So many questions right, the first ones."""
    return Measured(nats=nats, scores=[[0.0, -1.0] if index < right else [-1.0, 0.0] for index in range(10)])


ARMS = {"base": measured([20.0, 60.0], 6), "stage:sft": measured([25.0, 61.0], 5)}


def forgetting(nats: list[float], right: int, *, rise: float | None = 0.2, drop: float | None = 0.1) -> Forgetting:
    limits = Limits(perplexity_rise=rise, ability_drop=drop)
    return table(ARMS | {"stage:sft": measured(nats, right)}, MATERIAL, limits=limits, intervals=INTERVALS)


def test_perplexity_is_that_of_all_tokens_together_and_ability_a_share_of_questions() -> None:
    result = forgetting([25.0, 61.0], 5)
    base, arm = result.arms
    assert (result.num_texts, result.num_tokens, result.num_questions) == (2, 40, 10)
    close([base.nats, base.perplexity, base.ability], [2.0, math.exp(2.0), 0.6])
    close([arm.nats, arm.perplexity, arm.ability], [86 / 40, math.exp(86 / 40), 0.5])
    close([arm.rise.mean, arm.drop.mean], [math.exp(86 / 40) / math.exp(2.0) - 1, 0.1])
    # of two texts drawn with replacement, both are the one or both the other at the least
    close([arm.rise.low, arm.rise.high], [math.expm1(1 / 30), math.expm1(5 / 10)])
    assert (base.tasks, arm.tasks) == ({"even": 0.6, "odd": 0.6}, {"even": 0.6, "odd": 0.4})
    assert base.rise is base.drop is None
    assert headlines(result) == {
        "passed": 1.0,
        "perplexity/base": base.perplexity,
        "ability/base": 0.6,
        "perplexity/sft": arm.perplexity,
        "ability/sft": 0.5,
    }


def test_the_drop_has_the_interval_of_two_shares() -> None:
    """With equal answers every resample of the questions has the same drop, which would look certain."""
    for right in (6, 0, 10):
        _, arm = forgetting([20.0, 60.0], right).arms
        assert arm.drop == paired_share_interval(max(6 - right, 0), max(right - 6, 0), 10)


def test_an_arm_fails_beyond_a_limit_only() -> None:
    for rise, right, numbers in (
        (0.199, 5, []),
        (0.201, 6, ["20.1%", "20.0% is allowed"]),
        (0.0, 4, ["20.0%", "10.0% is allowed"]),
    ):
        more = math.log(1 + rise)
        result = forgetting([20.0 + 10 * more, 60.0 + 30 * more], right)
        assert result.passed is result.arms[1].passed is (not numbers)
        assert headlines(result)["passed"] == float(not numbers)
        assert [[number in reason for number in numbers] for reason in result.arms[1].reasons] == (
            [[True, True]] if numbers else []
        )


def test_only_limits_that_are_set_are_judged_and_texts_and_questions_are_recorded() -> None:
    assert forgetting([20.0, 60.0], 6, rise=0.0, drop=0.0).passed is True, "an unchanged policy passes"
    free, dropped = forgetting([2e5, 6e5], 0, rise=None, drop=None), forgetting([2e5, 6e5], 0, rise=None)
    assert (free.judged, free.passed, "passed" in headlines(free)) == (False, True, False)
    assert (dropped.judged, len(dropped.arms[1].reasons)) == (True, 1), "the other limit still counts"
    ruined = forgetting([2e5, 6e5], 0)
    assert ruined.passed is False
    assert "Infinity" not in json.dumps(to_json(ruined))
    assert [is_right(MATERIAL.questions[0], scores) for scores in ([0.0, -0.1], [0.0, 0.0], [-0.1, 0.0])] == [
        True,
        False,
        False,
    ], "who finds all choices alike knows nothing"
    assert text_rows(ARMS, MATERIAL)[1] == {"id": "t2", "tokens": 30, "nats": {"base": 60.0, "stage:sft": 61.0}}
    row = question_rows(ARMS, MATERIAL)[5]
    assert (row["id"], row["task"], row["answer"]) == ("5", "odd", "x")
    assert row["right"] == {"base": True, "stage:sft": False}
    assert row["scores"]["stage:sft"] == [-1.0, 0.0]
