"""A card's figures, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from alignment.data.records import PreferencePair
from alignment.data.turns import Message
from alignment.evaluation.card_measures import (
    BARS,
    Intervals,
    Judged,
    baselines,
    calibration,
    card_of,
    histogram,
    length_bias,
    right,
    rule_agreement,
    subsets,
    warnings,
    wilson,
    worst,
)
from alignment.evaluation.rates import unvaried_interval
from alignment.records.interval import Interval
from alignment.records.reward_card import Invariances, Learned, Length, RuleAgreement

INTERVALS = Intervals(samples=200, seed=1)


def judged(margin: float, *, prompt: int = 0, longer: int = 1, subset: str = "", **more: Any) -> Judged:
    pair = PreferencePair(
        messages=(Message(role="user", content=f"Question {prompt}?"),),
        chosen="Yes.",
        rejected="No.",
        subset=subset,
        where=f"pairs.jsonl:{prompt}",
    )
    return Judged(pair=pair, scores=(margin + 1.0, 1.0), tokens=(10 + longer, 10), **more)


def many(*margins: float, subset: str = "") -> list[Judged]:
    return [judged(margin, prompt=number, subset=subset) for number, margin in enumerate(margins)]


def test_a_tie_is_half_right() -> None:
    assert right([2.0, -1.0, 0.0]) == [1.0, 0.0, 0.5]
    card = card_of(many(2.0, -1.0, 0.0, 3.0), intervals=INTERVALS, num_worst=3)
    assert card.accuracy == Interval(mean=0.625), "four prompts are too few for an interval"


@pytest.mark.parametrize(("margin", "share"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_pairs_that_all_agree_leave_an_interval(margin: float, share: float) -> None:
    """No resample of the prompts can show what no pair shows."""
    card = card_of([judged(margin, prompt=n, longer=1) for n in range(20)], intervals=INTERVALS, num_worst=1)
    (longer,) = card.baselines
    assert card.accuracy == unvaried_interval(share, 20, least=0.0, most=1.0)
    assert longer.difference == unvaried_interval(share - 1.0, 20, least=-1.0, most=1.0)


def test_an_interval_lies_around_the_mean_and_is_the_same_every_time() -> None:
    pairs = many(*([1.0, 2.0, -1.0] * 20))
    interval = INTERVALS.of(right([pair.margin for pair in pairs]), pairs)
    assert interval.mean == pytest.approx(2 / 3)
    assert 0.5 < interval.low < 2 / 3 < interval.high < 0.8  # type: ignore[operator]
    assert INTERVALS.of(right([pair.margin for pair in pairs]), pairs) == interval


def test_pairs_of_one_prompt_are_no_independent_evidence() -> None:
    alone = many(*([1.0] * 30 + [-1.0] * 30))
    in_fives = [judged(pair.margin, prompt=number // 5) for number, pair in enumerate(alone)]
    values = right([pair.margin for pair in alone])
    independent, grouped = INTERVALS.of(values, alone), INTERVALS.of(values, in_fives)
    assert grouped.high - grouped.low > 1.5 * (independent.high - independent.low)  # type: ignore[operator]


def test_calibration_by_hand() -> None:
    # σ(ln 3) = .75 and σ(ln 9) = .9: four pairs at .75 of which three are right, one at .9 that is right.
    figures = calibration([math.log(3)] * 3 + [-math.log(3), math.log(9)])
    assert [(bin_.num_pairs, bin_.share) for bin_ in figures.bins] == [(4, 0.75), (1, 1.0)]
    assert [bin_.confidence for bin_ in figures.bins] == pytest.approx([0.75, 0.9])
    assert [(bin_.start, bin_.end) for bin_ in figures.bins] == [(0.7, 0.8), pytest.approx((0.9, 1.0))]
    assert figures.ece == pytest.approx((4 * 0.0 + 1 * 0.1) / 5)
    assert figures.brier == pytest.approx((3 * 0.25**2 + 0.75**2 + 0.1**2) / 5)
    assert figures.log_loss == pytest.approx(-(3 * math.log(0.75) + math.log(0.25) + math.log(0.9)) / 5)


def test_a_model_that_knows_nothing_has_the_scores_of_chance() -> None:
    figures = calibration([0.0] * 8)
    assert (figures.ece, figures.brier) == (0.0, 0.25)
    assert figures.log_loss == pytest.approx(math.log(2))


def test_sureness_beyond_all_numbers_stays_finite() -> None:
    figures = calibration([1e4, -1e4])
    assert figures.log_loss == pytest.approx(5e3)
    assert figures.bins[0].confidence == 1.0


def test_the_interval_of_a_share_is_wilson_s() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_a_histogram_has_an_edge_at_zero_and_holds_every_pair() -> None:
    bars = histogram([-0.4, 0.1, 0.2, 0.3, 50.0])
    assert 0.0 in [round(edge, 12) for edge in bars.edges]
    assert sum(bars.counts) == 5
    assert sum(bars.counts[: BARS // 2]) == 1
    assert sum(histogram([0.0, 0.0]).counts) == 2


def test_simpler_judges_stand_beside_the_model_pair_by_pair() -> None:
    pairs = [judged(1.0, prompt=n, longer=1 if n % 2 else -1, words=1.0 if n % 4 else -1.0) for n in range(20)]
    words, longer = baselines(pairs, INTERVALS)
    assert (words.name, words.accuracy.mean, words.difference.mean) == ("bag of words", 0.75, 0.25)
    assert (longer.name, longer.accuracy.mean) == ("longer answer", 0.5)
    assert 0 < longer.difference.low < 0.5 < longer.difference.high
    assert [baseline.name for baseline in baselines(many(1.0), INTERVALS)] == ["longer answer"]


def test_subsets_are_told_apart_and_one_pair_has_no_interval() -> None:
    pairs = [*many(1.0, -1.0, subset="chat"), judged(1.0, subset="math")]
    chat, math_ = subsets(pairs, INTERVALS)
    assert (chat.name, chat.num_pairs, chat.accuracy.mean) == ("chat", 2, 0.5)
    assert math_.accuracy == Interval(mean=1.0)
    assert subsets(many(1.0, 2.0), INTERVALS) == [], "there is but one"


def test_a_model_that_goes_by_length_is_seen_to() -> None:
    pairs = [judged(float(longer), longer=longer) for longer in (3, 2, -1, -2, 0)]
    bias = length_bias(pairs)
    assert bias.correlation == pytest.approx(1.0)
    assert (bias.prefers_longer, bias.longer_is_chosen) == (1.0, 0.5)
    assert (bias.accuracy_where_longer, bias.accuracy_where_shorter) == (1.0, 0.0)
    assert length_bias([judged(1.0, longer=0)]) == Length()


def test_agreement_with_a_rule_counts_where_the_rule_sees_a_difference() -> None:
    pairs = [
        judged(1.0, rule=(1.0, 0.5)),  # all three agree
        judged(-1.0, rule=(1.0, 0.5)),  # the rule is right, the model is not
        judged(-1.0, rule=(0.2, 0.5)),  # both are wrong
        judged(1.0, rule=(0.5, 0.5)),  # the rule sees no difference
    ]
    agreement = rule_agreement(pairs, INTERVALS)
    assert agreement is not None
    assert (agreement.num_pairs, agreement.agreement.mean, agreement.accuracy.mean) == (3, 2 / 3, 2 / 3)
    assert rule_agreement(pairs[3:], INTERVALS) == RuleAgreement()
    assert rule_agreement(many(1.0), INTERVALS) is None


def test_the_worst_pairs_are_the_surest_mistakes() -> None:
    assert [pair.margin for pair in worst(many(1.0, -3.0, -1.0, 0.0, -2.0), 2)] == [-3.0, -2.0]


def test_a_card_says_first_what_makes_its_figures_worthless() -> None:
    card = card_of(many(*[-1.0] * 20), intervals=INTERVALS, num_worst=1)
    learned = Learned(judged_too=3, left_out=False, part_known=False)
    sentences = warnings(replace(card, learned=learned, invariances=Invariances(moved=["alone"])))
    assert sentences[0].startswith("3 of the 20 pairs overlap with the model's training pairs")
    assert sentences[1].startswith("It is not known exactly on which part of its file the model was trained")
    assert sentences[2:] == [
        "It is right less often than the rule 'longer is better'.",
        "In float32 its scores change although they should not: alone.",
    ]
    even = card_of(many(*[1.0, -1.0] * 10), intervals=INTERVALS, num_worst=1)
    (doubt,) = warnings(even)
    assert doubt.startswith("It is right less often"), "the longer one is always right here"
    few = card_of(many(1.0), intervals=INTERVALS, num_worst=1)
    assert warnings(few)[0].startswith("It is not shown")
    good = card_of([judged(1.0, prompt=n, longer=-1) for n in range(20)], intervals=INTERVALS, num_worst=1)
    assert warnings(replace(good, learned=replace(learned, left_out=True, part_known=True))) == []
