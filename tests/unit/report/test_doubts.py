"""What a stage's figures say against its result."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.records.evaluation import ArmResult, Comparison, Evaluation, Grading, Judge, JudgedPair, Metric
from alignment.records.interval import Interval
from alignment.report.doubts import is_smoke, of_evaluation
from alignment.stages.registry import doubts


@pytest.mark.parametrize(
    ("kind", "figures", "beginning"),
    [
        ("reward", {"eval_accuracy": 0.5, "eval_rows": 30.0}, "right on 50% of 30 held-out pairs, no better than"),
        ("reward", {"eval_accuracy": 0.31}, "right on 31% of held-out pairs, no better than chance (50%)"),
        ("ppo", {"objective/score_std": 0.0}, "all answers to each of the last update's prompts had the same score"),
        ("ppo", {"objective/tied_share": 1.0}, "all answers to each of the last update's prompts had the same score"),
        ("ppo", {"eos_rate": 0.0}, "none of the last update's answers ended within max_new_tokens"),
    ],
)
def test_a_figure_that_speaks_against_a_stage_is_named(kind: str, figures: dict[str, float], beginning: str) -> None:
    (sentence,) = doubts(kind, figures)
    assert sentence.startswith(beginning)


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("reward", {"eval_accuracy": 0.51, "eval_rows": 30.0}),
        ("reward", {"score_offset": 0.1}),
        ("ppo", {"eos_rate": 0.01}),
        ("sft", {"loss": 1.0, "eos_rate": 0.0, "eval_accuracy": 0.0}),
    ],
)
def test_other_figures_are_no_reason(kind: str, figures: dict[str, float]) -> None:
    assert doubts(kind, figures) == []


def test_arms_whose_answers_were_all_cut_off_are_named() -> None:
    cut = ArmResult(name="base", ended=Interval(mean=0.0, low=0.0, high=0.0))
    others = [ArmResult(name="stage:sft", ended=Interval(mean=0.5)), ArmResult(name="stage:dpo")]
    assert of_evaluation(Evaluation(arms=[cut, *others])) == [
        "all answers of base were cut off at max_new_tokens, so their scores are those of unfinished text; raise it"
    ]
    assert of_evaluation(Evaluation(arms=others)) == []


def test_arms_most_of_whose_answers_were_cut_off_are_named_with_the_share() -> None:
    arms = [ArmResult(name="base", ended=Interval(mean=0.49)), ArmResult(name="stage:ppo", ended=Interval(mean=0.1))]
    assert of_evaluation(Evaluation(arms=arms)) == [
        "most answers of base (51%), ppo (90%) were cut off at max_new_tokens, so their scores are those of unfinished "
        "text; raise it"
    ]


def test_fewer_than_ten_prompts_are_too_few() -> None:
    (few,) = of_evaluation(Evaluation(num_prompts=9))
    assert few == "only 9 prompts were evaluated, too few for a verdict, which needs at least 10"
    assert of_evaluation(Evaluation(num_prompts=10)) == []


def test_prompts_without_a_grade_by_the_primary_metric_do_not_count() -> None:
    gradings = [Grading(metric="polite", num_prompts=9), Grading(metric="helpful", num_prompts=10)]
    evaluation = Evaluation(num_prompts=60, primary="helpful", gradings=gradings)
    assert of_evaluation(evaluation) == []
    (few,) = of_evaluation(replace(evaluation, primary="polite"))
    assert few == (
        "only 9 of 60 prompts have a score by polite in every arm, too few for a verdict, which needs at least 10"
    )


def test_a_smoke_run_is_known_by_its_profile() -> None:
    assert is_smoke("smoke")
    assert not is_smoke("")


def _one_beats_the_other(distinct: float, other: float, difference: float) -> Evaluation:
    arms = [ArmResult(name="stage:ppo", distinct=distinct), ArmResult(name="stage:sft", distinct=other)]
    low, high = difference - 0.05, difference + 0.05
    item = Comparison(
        arm="stage:ppo",
        against="stage:sft",
        metric="liked",
        difference=difference,
        low=low,
        high=high,
        adjusted_p=0.01 if abs(difference) > 0.1 else 0.4,
    )
    metrics = [Metric(name="liked")]
    return Evaluation(arms=arms, comparisons=[item], metrics=metrics, primary="liked", num_prompts=100)


def test_a_winner_that_says_the_same_to_everybody_is_named() -> None:
    assert of_evaluation(_one_beats_the_other(0.03, 0.86, 0.2)) == [
        "only 3% of the answers of ppo are distinct, against 86% of those of sft: read some before you trust its score"
    ]
    assert of_evaluation(_one_beats_the_other(0.86, 0.03, -0.2)) == [
        "only 3% of the answers of sft are distinct, against 86% of those of ppo: read some before you trust its score"
    ]


@pytest.mark.parametrize(
    ("distinct", "other", "difference"),
    [(0.44, 0.86, 0.2), (0.03, 0.05, 0.2), (0.03, 0.86, -0.2), (0.03, 0.86, 0.01)],
    ids=["half as many", "a task with few answers", "it loses", "it may be chance"],
)
def test_few_distinct_answers_alone_are_no_reason(distinct: float, other: float, difference: float) -> None:
    assert of_evaluation(_one_beats_the_other(distinct, other, difference)) == []


def test_answers_that_nothing_reads_may_be_cut_off_and_alike() -> None:
    """A metric may be the letter that a policy finds likeliest; then its answers decide nothing."""
    compared = _one_beats_the_other(0.03, 0.86, 0.2)
    arms = [replace(arm, ended=Interval(mean=0.0)) for arm in compared.arms]
    chosen = replace(compared, arms=arms, metrics=[Metric(name="liked", of_answers=False)])
    assert of_evaluation(chosen) == []
    assert of_evaluation(replace(chosen, judge=Judge(kind="metric", name="liked"))) == []
    for read in (
        replace(chosen, metrics=[*chosen.metrics, Metric(name="brevity")]),
        replace(chosen, judge=Judge(kind="endpoint", name="a-model")),
        replace(chosen, arms=[replace(arm, reward=Interval(mean=1.0)) for arm in arms]),
    ):
        (doubt,) = of_evaluation(read)
        assert doubt.startswith("all answers of ppo, sft were cut off at max_new_tokens, ")


def test_a_judge_without_a_verdict_on_any_pair_is_named() -> None:
    silent = JudgedPair(arm="stage:dpo", against="stage:sft", prompts=20, wins=0, ties=0, losses=0, invalid=1.0)
    heard = replace(silent, win_rate=Interval(mean=0.5, low=0.4, high=0.6))
    assert of_evaluation(Evaluation(judge=Judge(name="a-model", pairs=[silent, silent]))) == [
        "by a-model, nothing can be concluded about any pair of arms: 100% of the verdicts are invalid"
    ]
    for pairs in ([], [silent, heard]):
        assert of_evaluation(Evaluation(judge=Judge(name="a-model", pairs=pairs))) == []
