"""What an evaluation of its size can and cannot show, in sentences and by a formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from alignment.evaluation.bootstrap import detectable
from alignment.evaluation.conclusions import conclusions
from alignment.records.evaluation import NOTHING, Comparison, Judge, JudgedPair, Metric
from alignment.records.interval import Interval

LABELS = {"stage:sft": "sft", "stage:dpo": "dpo", "base": "base"}


BREVITY = Metric(name="brevity")


def comparison(arm: str, against: str, difference: float, *, real: bool, size: float | None) -> Comparison:
    half = abs(difference) * (0.5 if real else 2) + (0 if real else 0.1)
    low, high = difference - half, difference + half
    return Comparison(arm=arm, against=against, difference=difference, low=low, high=high, detectable=size)


def test_the_detectable_difference_by_hand() -> None:
    """Differences .1, .3, … of eight prompts: s = √(.08/7), so 2.8 · s / √8; z is 2.638 for a level of .05 / 6."""
    eight = [0.1, 0.3] * 4
    assert detectable(eight) == pytest.approx(2.8016 * math.sqrt(0.08 / 7) / math.sqrt(8), rel=1e-4)
    assert detectable(eight, comparisons=6) == pytest.approx(3.4799 * math.sqrt(0.08 / 7) / math.sqrt(8), rel=1e-4)


def test_nothing_is_detectable_on_so_few_prompts_that_no_test_could_show_it() -> None:
    assert detectable([0.4]) is None
    assert detectable([0.1, 0.3, 0.1, 0.3, 0.1]) is None, "2 / 2⁵ is above .05"
    assert detectable([0.1, 0.3] * 3) is not None
    assert detectable([0.1, 0.3] * 3, comparisons=2) is None


def test_arms_are_told_apart_or_not_and_the_size_that_would_be_missed_is_said() -> None:
    sentences = conclusions(
        102,
        BREVITY,
        [
            comparison("stage:sft", "base", 0.4, real=True, size=0.11),
            comparison("stage:dpo", "stage:sft", 0.01, real=False, size=0.052),
        ],
        None,
        LABELS,
    )
    assert sentences == [
        "102 prompts, by brevity: sft is better than base; dpo and sft cannot be told apart.",
        "A true difference in brevity below about 0.05 would be missed more than one time in five with this number "
        "of prompts.",
    ]


@pytest.mark.parametrize(("size", "words"), [(0.01, "0.01"), (0.0044, "0.0044"), (0.000213, "0.00021")])
def test_a_small_difference_is_not_rounded_to_none(size: float, words: str) -> None:
    pair = comparison("stage:dpo", "stage:sft", 0.001, real=False, size=size)
    assert f"below about {words} would be missed" in conclusions(5_000, BREVITY, [pair], None, LABELS)[-1]


def test_a_pair_that_only_its_own_interval_tells_apart_is_named() -> None:
    pair = replace(comparison("stage:dpo", "base", 0.4, real=True, size=0.1), p=0.03, adjusted_p=0.09)
    sentences = conclusions(102, BREVITY, [pair, replace(pair, arm="stage:sft")], None, LABELS)
    assert sentences[:2] == [
        "102 prompts, by brevity: dpo and base, sft and base cannot be told apart.",
        "The interval of dpo and base, sft and base excludes zero, but among 2 comparisons the difference may be due "
        "to chance.",
    ]


def test_a_randomisation_test_may_show_nothing_alone() -> None:
    pair = replace(comparison("stage:dpo", "base", 0.4, real=True, size=None), p=0.125, adjusted_p=0.125)
    assert conclusions(12, BREVITY, [pair], None, LABELS)[1] == (
        "The interval of dpo and base excludes zero, but by a randomisation test the difference may be due to chance."
    )


def test_less_of_a_metric_may_be_better() -> None:
    words = Metric(name="words", higher_is_better=False)
    fewer = comparison("stage:sft", "base", -4.0, real=True, size=None)
    assert conclusions(10, words, [fewer], None, LABELS) == ["10 prompts, by words: sft is better than base."]


def test_too_few_prompts_show_nothing() -> None:
    pair = comparison("stage:dpo", "base", 0.4, real=True, size=0.1)
    assert conclusions(9, BREVITY, [pair], None, LABELS) == [
        "9 prompts, by brevity: fewer than 10 prompts, so no difference can be shown."
    ]


def test_no_spread_or_one_arm_says_no_size() -> None:
    assert conclusions(5, BREVITY, [], None, LABELS) == []
    assert conclusions(5, None, [], None, LABELS) == [
        "5 prompts, but no metric and no judge, so no arm is called better than another."
    ]
    (sentence,) = conclusions(10, BREVITY, [comparison("stage:dpo", "base", 0.0, real=False, size=None)], None, LABELS)
    assert "cannot be told apart" in sentence


def test_a_judge_has_a_sentence_that_says_where_nothing_can_be_concluded() -> None:
    rate = Interval(mean=0.62, low=0.53, high=0.71)
    pair = JudgedPair(arm="stage:dpo", against="stage:sft", wins=1, ties=2, losses=3, verdict="better", win_rate=rate)
    invalid = replace(pair, against="base", win_rate=None, invalid=0.4, verdict=NOTHING)
    judge = Judge(name="some-model", num_prompts=100, pairs=[pair, invalid])
    assert conclusions(100, None, [], judge, LABELS) == [
        "By some-model on 100 prompts, ties counted as half a win: dpo wins 0.62 against sft (0.53 to 0.71), better; "
        "nothing can be concluded about dpo and base (40% of the verdicts are invalid)."
    ]


def test_a_win_that_length_explains_is_called_so() -> None:
    rate, even = Interval(mean=0.62, low=0.53, high=0.71), Interval(mean=0.52, low=0.41, high=0.6)
    pair = JudgedPair(arm="stage:dpo", against="base", wins=1, ties=2, losses=3, verdict="better", win_rate=rate)
    (by_length,) = conclusions(
        100, None, [], Judge(name="m", num_prompts=100, pairs=[replace(pair, length_controlled=even)]), LABELS
    )
    assert by_length.endswith("better, but at equal lengths 0.52 (0.41 to 0.60), no real difference.")
    (by_both,) = conclusions(
        100, None, [], Judge(name="m", num_prompts=100, pairs=[replace(pair, length_controlled=rate)]), LABELS
    )
    assert by_both.endswith("(0.53 to 0.71), better.")
