"""Both orders of a pair put together, against cases worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.evaluating import JudgeConfig, PairConfig
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.grammar import Verdict
from alignment.evaluation.pairwise import (
    BothOrders,
    agreement,
    invalid_share,
    kappa,
    pairs_of,
    points_of,
    position_bias,
)
from alignment.evaluation.tables import judged_pair, with_verdicts
from alignment.records.evaluation import NOTHING, JudgedPair

A, B, TIE, BAD = Verdict.first, Verdict.second, Verdict.tie, Verdict.invalid


def both(arm_first: Verdict, arm_second: Verdict) -> BothOrders:
    return BothOrders(arm_first=arm_first, arm_second=arm_second)


@pytest.mark.parametrize(
    ("arm_first", "arm_second", "points", "lean"),
    [
        (A, B, 1.0, 0.0),  # the arm's answer both times
        (B, A, 0.0, 0.0),
        (TIE, TIE, 0.5, 0.0),
        (A, A, 0.5, 1.0),  # whichever comes first
        (B, B, 0.5, -1.0),
        (A, TIE, 0.5, 0.5),
        (TIE, A, 0.5, 0.5),
        (TIE, B, 0.5, -0.5),
        (B, TIE, 0.5, -0.5),
    ],
)
def test_a_win_needs_both_orders(arm_first: Verdict, arm_second: Verdict, points: float, lean: float) -> None:
    orders = both(arm_first, arm_second)
    assert (orders.points, orders.lean) == (points, lean)
    assert orders.agree == ((arm_first, arm_second) in [(A, B), (B, A), (TIE, TIE)])


@pytest.mark.parametrize(("arm_first", "arm_second"), [(BAD, B), (A, BAD), (BAD, BAD)])
def test_an_invalid_verdict_gives_no_points(arm_first: Verdict, arm_second: Verdict) -> None:
    assert both(arm_first, arm_second).points is None


JUDGED = [both(A, B), both(A, BAD), both(A, B), both(B, A), both(BAD, BAD), both(TIE, TIE), both(A, A), both(A, TIE),
          both(B, B), both(A, A)]  # fmt: skip


def row(judged: list[BothOrders], **changes: Any) -> JudgedPair:
    settings: dict[str, Any] = {
        "extra_words": [float(number) for number in range(len(judged))],
        "by_metric": None,
        "max_invalid": 0.2,
        "intervals": Intervals(samples=500, seed=0),
    }
    points = [orders.points for orders in judged]
    return judged_pair("stage:dpo", "stage:sft", points, judged, **(settings | changes))


def test_the_win_rate_at_equal_lengths_is_over_the_prompts_that_count() -> None:
    """A prompt without a valid verdict takes no part, and neither does the length of its answers."""
    judged = [both(A, B), both(A, B), both(B, A), both(A, A)] * 10
    longer = [float(number % 7 - 2) for number in range(40)]
    pair = row(judged, extra_words=longer)
    assert pair.length_controlled is not None
    assert pair.length_controlled != pair.win_rate
    invalid = row([judged[0], both(BAD, BAD), *judged[1:]], extra_words=[longer[0], -9000.0, *longer[1:]])
    assert invalid.length_controlled == pair.length_controlled


def test_without_a_win_rate_there_is_none_at_equal_lengths() -> None:
    assert row([both(A, B), *[both(BAD, BAD)] * 9]).length_controlled is None


def test_agreement_bias_and_invalid_shares_by_hand() -> None:
    """Ten prompts, two invalid by three verdicts of twenty. Of eight, four agree; the leans are 1, .5, -1 and 1."""
    assert invalid_share(JUDGED) == pytest.approx(3 / 20)
    assert agreement(JUDGED) == pytest.approx(4 / 8)
    assert position_bias(JUDGED) == pytest.approx(1.5 / 8)


def test_a_row_counts_wins_ties_and_losses_and_ties_are_half_a_win() -> None:
    pair = row(JUDGED)
    assert (pair.prompts, pair.wins, pair.ties, pair.losses) == (10, 2, 5, 1)
    assert pair.win_rate is not None
    assert pair.win_rate.bounds is not None
    assert pair.win_rate.mean == pytest.approx((2 + 5 / 2) / 8)
    assert pair.win_rate.bounds[0] < 0.5 < pair.win_rate.bounds[1]
    assert pair.verdict == "fewer than 10 prompts", "two of the ten prompts are invalid"
    assert pair.metric_agreement is None


def test_ten_valid_prompts_are_the_fewest_for_a_verdict() -> None:
    """An interval of nine wins in nine prompts leaves no room for chance, however few they are."""
    assert [row([both(A, B)] * prompts).verdict for prompts in (9, 10)] == ["fewer than 10 prompts", "better"]
    mixed = [both(A, B), both(B, A)] * 5
    assert row(mixed).verdict == "no real difference"


def test_a_judge_that_always_names_the_first_place_tells_nothing_apart() -> None:
    pair = row([both(A, A)] * 20)
    assert pair.win_rate is not None
    assert pair.win_rate.mean == 0.5
    assert pair.position_bias == 1.0
    assert pair.agreement == 0.0
    assert pair.verdict == "no real difference"


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "p"),
    [(4, 0, 196, 2 / 2**4), (7, 1, 0, 18 / 2**8), (6, 0, 4, 2 / 2**6), (9, 1, 0, 22 / 2**10)],
)
def test_a_verdict_needs_more_than_chance_over_the_prompts_that_decide(
    wins: int, losses: int, ties: int, p: float
) -> None:
    """By the sign test, whose p values are exact. The bootstrap's interval of four wins and 196 ties excludes .5."""
    pair = row([both(A, B)] * wins + [both(B, A)] * losses + [both(A, A)] * ties)
    assert pair.p == pytest.approx(p, abs=0.01)
    assert pair.adjusted_p == pair.p
    decided = "better" if p < 0.05 else "no real difference"
    assert pair.verdict == (decided if wins + losses + ties >= 10 else "fewer than 10 prompts")


def test_the_pairs_of_a_judge_are_corrected_for_their_number() -> None:
    close, clear, even = (row([both(A, B)] * n + [both(B, A)] * (20 - n)) for n in (15, 20, 10))
    assert close.p is not None
    assert clear.p is not None
    assert close.verdict == clear.verdict == "better"
    nothing = row([both(BAD, BAD)] * 20)
    pairs = with_verdicts([close, even, nothing, clear])
    assert [pair.verdict for pair in pairs] == ["no real difference", "no real difference", NOTHING, "better"]
    assert pairs[0].adjusted_p == pytest.approx(2 * close.p)
    assert pairs[3].adjusted_p == pytest.approx(3 * clear.p)
    assert pairs[2].adjusted_p is None


def test_consistent_verdicts_are_called_better_and_worse() -> None:
    assert row([both(A, B)] * 20).verdict == "better"
    assert row([both(B, A)] * 20).verdict == "worse"


@pytest.mark.parametrize(("max_invalid", "concludes"), [(0.1, False), (0.15, True), (1.0, True)])
def test_too_many_invalid_verdicts_conclude_nothing(max_invalid: float, concludes: bool) -> None:
    pair = row(JUDGED, max_invalid=max_invalid)
    assert (pair.win_rate is not None) == concludes
    assert (pair.verdict != NOTHING) == concludes
    assert pair.wins == 2, "what was valid is still told"


def test_without_one_valid_verdict_nothing_is_concluded_at_any_bound() -> None:
    pair = row([both(BAD, BAD)] * 4, max_invalid=1.0, by_metric=[1.0] * 4)
    assert pair.win_rate is None
    assert pair.verdict == NOTHING
    assert pair.agreement is None
    assert pair.metric_kappa is None


def test_scores_are_compared_and_equal_ones_tie() -> None:
    assert [points_of(*pair) for pair in ((0.2, 0.1), (0.5, 0.5), (0.1, 0.3))] == [1.0, 0.5, 0.0]
    assert points_of(None, 0.1) is points_of(0.1, None) is None


def test_agreement_with_the_metric_leaves_invalid_prompts_out() -> None:
    """Judge: win win loss tie tie tie tie tie; the metric the same on the first four and wins after."""
    by_metric = [1.0, 0.0, 1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    pair = row(JUDGED, by_metric=by_metric)
    assert pair.metric_agreement == pytest.approx(4 / 8)
    # Chance: wins 2/8 · 6/8, ties 5/8 · 1/8, losses 1/8 · 1/8.
    chance = (2 * 6 + 5 * 1 + 1 * 1) / 64
    assert pair.metric_kappa == pytest.approx((0.5 - chance) / (1 - chance))


def test_kappa_by_a_table_worked_by_hand() -> None:
    """20 both win, 5 win/lose, 10 lose/win, 15 both lose: .7 observed, .5 by chance, so κ = .4."""
    first = [1.0] * 25 + [0.0] * 25
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa(first, first) == pytest.approx(1.0)
    assert kappa([1.0, 1.0], [1.0, 1.0]) is None


def test_trained_arms_meet_reference_and_prompted_base_unless_pairs_are_named() -> None:
    arms = ["base", "base+prompt", "base+few-shot", "stage:sft", "stage:dpo", "path:other"]
    assert pairs_of(JudgeConfig(), arms, reference="stage:sft") == [
        ("stage:sft", "base+prompt"),
        ("stage:dpo", "stage:sft"),
        ("stage:dpo", "base+prompt"),
        ("path:other", "stage:sft"),
        ("path:other", "base+prompt"),
    ]
    assert pairs_of(JudgeConfig(), ["base", "stage:dpo"], reference="stage:sft") == []
    named = JudgeConfig(pairs=[PairConfig(arm="stage:dpo", against="base")])
    assert pairs_of(named, arms, reference="stage:sft") == [("stage:dpo", "base")]
