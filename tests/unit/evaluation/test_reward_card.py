"""A card's numbers, worked by hand, and the bag of words that stands beside a reward model."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alignment.core.errors import DataError
from alignment.data.records import PreferencePair
from alignment.data.turns import Message
from alignment.evaluation.bag_of_words import PENALTIES, differences, fit, fitted, loss, slope, words_of
from alignment.evaluation.card_measures import (
    BARS,
    Judged,
    baselines,
    calibration,
    card_of,
    histogram,
    interval_over,
    length_bias,
    right,
    rule_agreement,
    subsets,
    warnings,
    wilson,
    worst,
)
from alignment.evaluation.statistics import Intervals, unvaried_interval
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


def test_measures_of_a_card_by_hand() -> None:
    assert right([2.0, -1.0, 0.0]) == [1.0, 0.0, 0.5]
    card = card_of(many(2.0, -1.0, 0.0, 3.0), intervals=INTERVALS, num_worst=3)
    assert card.accuracy == Interval(mean=0.625), "four prompts are too few for an interval"
    assert [pair.margin for pair in worst(many(1.0, -3.0, -1.0, 0.0, -2.0), 2)] == [-3.0, -2.0]
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    bars = histogram([-0.4, 0.1, 0.2, 0.3, 50.0])
    assert 0.0 in [round(edge, 12) for edge in bars.edges]
    assert (sum(bars.counts), sum(bars.counts[: BARS // 2])) == (5, 1)
    assert sum(histogram([0.0, 0.0]).counts) == 2
    pairs = [judged(1.0, prompt=n, longer=1 if n % 2 else -1, words=1.0 if n % 4 else -1.0) for n in range(20)]
    words, longer = baselines(pairs, INTERVALS)
    assert (words.name, words.accuracy.mean, words.difference.mean) == ("bag of words", 0.75, 0.25)
    assert (longer.name, longer.accuracy.mean) == ("longer answer", 0.5)
    assert 0 < longer.difference.low < 0.5 < longer.difference.high
    assert [baseline.name for baseline in baselines(many(1.0), INTERVALS)] == ["longer answer"]
    chat, math_ = subsets([*many(1.0, -1.0, subset="chat"), judged(1.0, subset="math")], INTERVALS)
    assert (chat.name, chat.num_pairs, chat.accuracy.mean) == ("chat", 2, 0.5)
    assert (math_.name, math_.accuracy) == ("math", Interval(mean=1.0))
    assert subsets(many(1.0, 2.0), INTERVALS) == [], "there is but one"
    bias = length_bias([judged(float(longer), longer=longer) for longer in (3, 2, -1, -2, 0)])
    assert bias.correlation == pytest.approx(1.0)
    assert (bias.prefers_longer, bias.longer_is_chosen) == (1.0, 0.5)
    assert (bias.accuracy_where_longer, bias.accuracy_where_shorter) == (1.0, 0.0)
    assert length_bias([judged(1.0, longer=0)]) == Length()
    pairs = [
        judged(1.0, rule=(1.0, 0.5)),  # all three agree
        judged(-1.0, rule=(1.0, 0.5)),  # the rule is right, the model is not
        judged(-1.0, rule=(0.2, 0.5)),  # both are wrong
        judged(1.0, rule=(0.5, 0.5)),  # the rule sees no difference
    ]
    agreement = rule_agreement(pairs, INTERVALS)
    assert (agreement.num_pairs, agreement.agreement.mean, agreement.accuracy.mean) == (3, 2 / 3, 2 / 3)
    assert rule_agreement(pairs[3:], INTERVALS) == RuleAgreement()
    assert rule_agreement(many(1.0), INTERVALS) is None


@pytest.mark.parametrize(("margin", "share"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_pairs_that_all_agree_leave_an_interval(margin: float, share: float) -> None:
    """No resample of the prompts can show what no pair shows."""
    card = card_of([judged(margin, prompt=n, longer=1) for n in range(20)], intervals=INTERVALS, num_worst=1)
    (longer,) = card.baselines
    assert card.accuracy == unvaried_interval(share, 20, least=0.0, most=1.0)
    assert longer.difference == unvaried_interval(share - 1.0, 20, least=-1.0, most=1.0)


def test_pairs_of_one_prompt_are_no_independent_evidence() -> None:
    alone = many(*([1.0] * 30 + [-1.0] * 30))
    in_fives = [judged(pair.margin, prompt=number // 5) for number, pair in enumerate(alone)]
    values = right([pair.margin for pair in alone])
    independent, grouped = (interval_over(values, pairs, INTERVALS) for pairs in (alone, in_fives))
    assert grouped.bounds is not None
    assert 0.35 < independent.bounds[0] < independent.mean == 0.5 < independent.bounds[1] < 0.65
    width, width_of_groups = (high - low for low, high in (independent.bounds, grouped.bounds))
    assert width_of_groups > 1.5 * width
    assert interval_over(values, alone, INTERVALS) == independent


def test_calibration_by_hand() -> None:
    # σ(ln 3) = .75 and σ(ln 9) = .9: four pairs at .75 of which three are right, one at .9 that is right.
    result = calibration([math.log(3)] * 3 + [-math.log(3), math.log(9)])
    assert [(bin_.num_pairs, bin_.share) for bin_ in result.bins] == [(4, 0.75), (1, 1.0)]
    assert [bin_.confidence for bin_ in result.bins] == pytest.approx([0.75, 0.9])
    assert [(bin_.start, bin_.end) for bin_ in result.bins] == [(0.7, 0.8), pytest.approx((0.9, 1.0))]
    assert result.ece == pytest.approx((4 * 0.0 + 1 * 0.1) / 5)
    assert result.brier == pytest.approx((3 * 0.25**2 + 0.75**2 + 0.1**2) / 5)
    assert result.log_loss == pytest.approx(-(3 * math.log(0.75) + math.log(0.25) + math.log(0.9)) / 5)
    chance = calibration([0.0] * 8)
    assert (chance.ece, chance.brier, chance.log_loss) == (0.0, 0.25, pytest.approx(math.log(2)))
    sure = calibration([1e4, -1e4])
    assert (sure.log_loss, sure.bins[0].confidence) == (pytest.approx(5e3), 1.0)


@pytest.mark.parametrize(
    ("pairs", "changes", "begins"),
    [
        (
            many(*[-1.0] * 20),
            {
                "learned": Learned(judged_too=3, left_out=False, part_known=False),
                "invariances": Invariances(moved=["alone"]),
            },
            ["3 of the 20 pairs overlap", "It is not known exactly", "It is right less often", "In float32 its scores"],
        ),
        (many(*[1.0, -1.0] * 10), {}, ["It is right less often"]),  # the longer one is always right here
        (many(1.0), {}, ["It is not shown"]),
        (
            [judged(1.0, prompt=n, longer=-1) for n in range(20)],
            {"learned": Learned(judged_too=3, left_out=True, part_known=True)},
            [],
        ),
    ],
)
def test_a_card_says_first_what_makes_its_numbers_worthless(
    pairs: list[Judged], changes: dict[str, Any], begins: list[str]
) -> None:
    sentences = warnings(replace(card_of(pairs, intervals=INTERVALS, num_worst=1), **changes))
    assert len(sentences) >= len(begins)
    assert all(sentence.startswith(begin) for sentence, begin in zip(sentences, begins, strict=False))
    assert bool(sentences) is bool(begins)


WORDS = ("the", "note", "shop", "keys", "hall", "monday", "closed", "please", "sure", "sorry")


def random_pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(3)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def slow_objective(pairs: list[tuple[str, str]], weights: dict[str, float], penalty: float) -> float:
    """Written from the definition, a word at a time."""
    total = penalty / 2 * sum(weight**2 for weight in weights.values())
    for chosen, rejected in pairs:
        margin = sum(
            weight * (np.log1p(chosen.split().count(word)) - np.log1p(rejected.split().count(word)))
            for word, weight in weights.items()
        )
        total += float(np.log1p(np.exp(-margin)))
    return total


def test_words_are_counted() -> None:
    assert words_of("I'm sorry, I’m not. SORRY!") == {"i'm": 2, "sorry": 2, "not": 1}
    assert words_of("今天 天气。OK") == {"今": 1, "天": 2, "气": 1, "ok": 1}
    assert words_of("किताब, खुली किताब, İstanbul") == {"किताब": 2, "खुली": 1, "istanbul": 1}


@pytest.mark.parametrize("penalty", [0.3, 10.0])
def test_the_fit_lies_where_no_small_change_lowers_the_loss(penalty: float) -> None:
    pairs = random_pairs(60)
    features = differences(pairs, {word: index for index, word in enumerate(WORDS)})
    weights = fitted(features, penalty)
    lowest = slow_objective(pairs, dict(zip(WORDS, weights, strict=True)), penalty)
    assert lowest == pytest.approx(60 * loss(features, weights) + penalty / 2 * float(weights @ weights), rel=1e-12)
    for index in range(len(WORDS)):
        for step in (-1e-3, 1e-3):
            moved = weights.copy()
            moved[index] += step
            assert slow_objective(pairs, dict(zip(WORDS, moved, strict=True)), penalty) > lowest
    assert np.abs(slope(features, weights, penalty)).max() < 1e-6


def test_a_word_that_decides_all_is_learned_and_a_swapped_pair_has_the_opposite_margin() -> None:
    pairs = [(f"good {chosen}", rejected) for chosen, rejected in random_pairs(40)]
    groups = [str(number) for number in range(40)]
    bag = fit(pairs, groups, seed=0)
    assert bag.heaviest(3)[0][0] == "good"
    assert min(bag.margins(pairs)) > 0
    swapped = [(rejected, chosen) for chosen, rejected in pairs]
    assert bag.margins(swapped) == pytest.approx([-margin for margin in bag.margins(pairs)])
    assert bag.margins([("unheard of", "quite new"), ("good", "good")]) == [0.0, 0.0]
    assert fit(pairs, groups, seed=0).weights.tobytes() == bag.weights.tobytes()
    noise = random_pairs(40)
    assert fit(noise, groups, seed=0).penalty == max(PENALTIES), "prompts that were left out show nothing to learn"
    assert fit(noise, ["the same"] * 40, seed=0).penalty in PENALTIES
    with pytest.raises(DataError, match="1 pairs"):
        fit([("a b", "c")], ["0"], seed=0)
