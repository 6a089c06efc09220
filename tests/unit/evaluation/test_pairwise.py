"""Verdicts of judges and votes of people put together, against cases worked by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from alignment.config.evaluating import JudgeConfig, PairConfig
from alignment.core.errors import ConfigError
from alignment.evaluation.answer_pairs import AnswerPair, krippendorff_alpha, pairs_of_samples, queue, shown_first
from alignment.evaluation.statistics import Intervals
from alignment.evaluation.tables import judged_pair, with_verdicts
from alignment.evaluation.verdicts import (
    BothOrders,
    Verdict,
    agreement,
    invalid_share,
    kappa,
    pairs_of,
    points_of,
    position_bias,
)
from alignment.evaluation.votes_on_pairs import VotesOnPair, row_of, votes_on
from alignment.records.evaluation import NOTHING, JudgedPair
from alignment.records.votes import TIE, Vote
from tests.judged import ARMS, DPO, SFT, pair, sample, vote

INTERVALS = Intervals(samples=400, seed=1)
FIRST, SECOND, EQUAL, BAD = Verdict.first, Verdict.second, Verdict.tie, Verdict.invalid


def both(arm_first: Verdict, arm_second: Verdict) -> BothOrders:
    return BothOrders(arm_first=arm_first, arm_second=arm_second)


WIN, LOSS, LEANS, TIED, INVALID = (
    both(FIRST, SECOND), both(SECOND, FIRST), both(FIRST, FIRST), both(EQUAL, EQUAL), both(BAD, BAD)
)  # fmt: skip
JUDGED = [WIN, both(FIRST, BAD), WIN, LOSS, INVALID, TIED, LEANS, both(FIRST, EQUAL), both(SECOND, SECOND), LEANS]


@pytest.mark.parametrize(
    ("orders", "points", "lean"),
    [
        (WIN, 1.0, 0.0),  # the arm's answer both times
        (LOSS, 0.0, 0.0),
        (TIED, 0.5, 0.0),
        (LEANS, 0.5, 1.0),  # whichever comes first
        (both(SECOND, SECOND), 0.5, -1.0),
        (both(EQUAL, SECOND), 0.5, -0.5),
    ],
)
def test_a_win_needs_both_orders(orders: BothOrders, points: float, lean: float) -> None:
    assert (orders.points, orders.lean) == (points, lean)
    assert orders.agree == (orders in [WIN, LOSS, TIED])


def row(judged: list[BothOrders], **changes: Any) -> JudgedPair:
    settings: dict[str, Any] = {
        "extra_words": [float(number) for number in range(len(judged))],
        "by_metric": None,
        "max_invalid": 0.2,
        "intervals": INTERVALS,
    }
    points = [orders.points for orders in judged]
    return judged_pair("stage:dpo", "stage:sft", points, judged, **(settings | changes))


def test_a_row_by_hand() -> None:
    """Ten prompts, two invalid by three verdicts of twenty. Of eight, four agree; the leans are 1, .5, -1 and 1."""
    assert [orders.points for orders in (both(BAD, SECOND), both(FIRST, BAD), INVALID)] == [None] * 3
    assert (invalid_share(JUDGED), agreement(JUDGED), position_bias(JUDGED)) == (3 / 20, 4 / 8, 1.5 / 8)
    whole = row(JUDGED)
    assert (whole.arm, whole.against) == ("stage:dpo", "stage:sft")
    assert (whole.prompts, whole.wins, whole.ties, whole.losses) == (10, 2, 5, 1)
    assert (whole.invalid, whole.agreement, whole.position_bias) == (3 / 20, 4 / 8, 1.5 / 8)
    assert whole.win_rate.mean == pytest.approx((2 + 5 / 2) / 8)
    assert whole.win_rate.bounds[0] < 0.5 < whole.win_rate.bounds[1]
    assert whole.verdict == "fewer than 10 prompts", "two of the ten prompts are invalid"
    assert whole.metric_agreement is None


def test_the_win_rate_at_equal_lengths_is_over_the_prompts_that_count() -> None:
    judged = [WIN, WIN, LOSS, LEANS] * 10
    longer = [float(number % 7 - 2) for number in range(40)]
    whole = row(judged, extra_words=longer)
    assert whole.length_controlled is not None
    assert whole.length_controlled != whole.win_rate
    invalid = row([judged[0], INVALID, *judged[1:]], extra_words=[longer[0], -9000.0, *longer[1:]])
    assert invalid.length_controlled == whole.length_controlled
    assert row([WIN, *[INVALID] * 9]).length_controlled is None


@pytest.mark.parametrize(
    ("judged", "verdict"),
    [
        ([WIN] * 10, "better"),
        ([LOSS] * 20, "worse"),
        ([LEANS] * 20, "no real difference"),
    ],
)
def test_a_verdict_needs_ten_prompts_and_more_than_chance(judged: list[BothOrders], verdict: str) -> None:
    assert row(judged).verdict == verdict


@pytest.mark.parametrize(("wins", "losses", "ties", "p"), [(4, 0, 196, 2 / 2**4), (9, 1, 0, 22 / 2**10)])
def test_ties_are_no_evidence(wins: int, losses: int, ties: int, p: float) -> None:
    """By the sign test, whose p values are exact. The bootstrap's interval of four wins and 196 ties excludes .5."""
    whole = row([WIN] * wins + [LOSS] * losses + [LEANS] * ties)
    assert whole.p == pytest.approx(p, abs=0.01)
    assert whole.adjusted_p == whole.p
    assert whole.verdict == ("better" if p < 0.05 else "no real difference")


def test_the_pairs_of_a_judge_are_corrected_for_their_number() -> None:
    close, clear, even = (row([WIN] * wins + [LOSS] * (20 - wins)) for wins in (15, 20, 10))
    assert close.p is not None
    assert clear.p is not None
    assert close.verdict == clear.verdict == "better"
    pairs = with_verdicts([close, even, row([INVALID] * 20), clear])
    assert [pair.verdict for pair in pairs] == ["no real difference", "no real difference", NOTHING, "better"]
    assert pairs[0].adjusted_p == pytest.approx(2 * close.p)
    assert pairs[3].adjusted_p == pytest.approx(3 * clear.p)
    assert pairs[2].adjusted_p is None


@pytest.mark.parametrize(("max_invalid", "concludes"), [(0.1, False), (0.15, True), (1.0, True)])
def test_too_many_invalid_verdicts_conclude_nothing(max_invalid: float, concludes: bool) -> None:
    whole = row(JUDGED, max_invalid=max_invalid)
    assert (whole.win_rate is not None) == (whole.verdict != NOTHING) == concludes
    assert whole.wins == 2, "what was valid is still counted"
    nothing = row([INVALID] * 4, max_invalid=max_invalid, by_metric=[1.0] * 4)
    assert nothing.verdict == NOTHING
    assert (nothing.win_rate, nothing.agreement, nothing.metric_kappa) == (None, None, None)


def test_agreements_by_hand_leave_invalid_prompts_out() -> None:
    """Judge: win win loss tie tie tie tie tie; the metric the same on the first four and wins after."""
    by_metric = [1.0, 0.0, 1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    whole = row(JUDGED, by_metric=by_metric)
    assert whole.metric_agreement == pytest.approx(4 / 8)
    # Chance: wins 2/8 · 6/8, ties 5/8 · 1/8, losses 1/8 · 1/8.
    chance = (2 * 6 + 5 * 1 + 1 * 1) / 64
    assert whole.metric_kappa == pytest.approx((0.5 - chance) / (1 - chance))
    first = [1.0] * 25 + [0.0] * 25
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa([1.0, 1.0], [1.0, 1.0]) is None
    assert [points_of(*scores) for scores in ((0.2, 0.1), (0.5, 0.5), (0.1, 0.3))] == [1.0, 0.5, 0.0]
    assert points_of(None, 0.1) is points_of(0.1, None) is None


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
    named = [PairConfig(arm="stage:dpo", against="base"), PairConfig(arm="stage:sft", against="base")]
    assert pairs_of(JudgeConfig(pairs=named), arms, reference="stage:sft") == [
        ("stage:dpo", "base"),
        ("stage:sft", "base"),
    ]


PAIRS = [pair(number) for number in range(1, 21)]
MIXED = [pair(number) if number <= 6 else pair(number, sft="same", dpo="same ") for number in range(1, 17)]
"""Six prompts with different answers, and ten with identical ones."""


def voted(votes: Sequence[Vote], pairs: Sequence[AnswerPair] = PAIRS) -> VotesOnPair:
    return votes_on(votes, DPO, SFT, pairs)


def row_by_people(
    votes: Sequence[Vote], pairs: Sequence[AnswerPair] = PAIRS, *, by_metric: Sequence[float] | None = None
) -> JudgedPair:
    words = [float(number % 4 - 1.5) for number in range(len(pairs))]
    return row_of(voted(votes, pairs), extra_words=words, by_metric=by_metric, intervals=INTERVALS)


def test_a_row_of_votes_has_means_the_position_bias_and_the_side_that_most_prefer() -> None:
    votes = [vote(PAIRS[0]), vote(PAIRS[0], SFT, annotator="bo"), vote(PAIRS[0], annotator="cy")]
    votes += [vote(PAIRS[1]), vote(PAIRS[1], TIE, annotator="bo"), vote(PAIRS[2], TIE)]
    assert voted(votes).points()[:4] == [pytest.approx(2 / 3), 0.75, 0.5, None]
    assert votes_on(votes, SFT, DPO, PAIRS).points()[:4] == [pytest.approx(1 / 3), 0.25, 0.5, None]
    votes = [vote(PAIRS[0], SFT), vote(PAIRS[1], shown_first=DPO), vote(PAIRS[2], TIE)]
    votes.append(vote(PAIRS[3], SFT, shown_first=DPO))
    assert row_by_people(votes).position_bias == pytest.approx((1 + 1 + 0 - 1) / 4)
    votes = [vote(about) for about in PAIRS[:9]] + [vote(PAIRS[9], annotator=name) for name in ("ada", "bo")]
    votes.append(vote(PAIRS[9], SFT, annotator="cy"))
    whole = row_by_people(votes, by_metric=[1.0] * 8 + [0.5] * 12)
    assert (whole.metric_agreement, whole.metric_prompts) == (pytest.approx(8 / 10), 10)


@pytest.mark.parametrize("annotators", [["ada"], ["ada", "bo"]])
def test_the_row_has_the_rate_of_the_prompts_that_were_judged(annotators: list[str]) -> None:
    """The interval is over prompts: annotators who agree know no more of other prompts than one does."""
    preferred = [DPO] * 7 + [TIE] * 2 + [SFT] * 3
    votes = [
        vote(about, choice, annotator=name)
        for about, choice in zip(PAIRS, preferred, strict=False)
        for name in annotators
    ]
    whole = row_by_people(votes)
    assert whole.length_controlled is not None
    assert (whole.wins, whole.ties, whole.losses, whole.prompts) == (7, 2, 3, 20)
    assert whole.win_rate == INTERVALS.of_points([1.0] * 7 + [0.5] * 2 + [0.0] * 3)
    assert (whole.people.judged, whole.people.votes, whole.people.annotators) == (
        12, 12 * len(annotators), len(annotators)
    )  # fmt: skip
    assert whole.verdict == "no real difference"


def test_ten_prompts_must_be_judged_and_votes_on_other_answers_are_stale() -> None:
    none, nine, ten = (
        row_by_people([vote(about, annotator=name) for about in PAIRS[:number] for name in ("ada", "bo")])
        for number in (0, 9, 10)
    )
    assert (none.wins, none.ties, none.losses, none.win_rate) == (0, 0, 0, None)
    assert none.verdict == nine.verdict == "nothing can be concluded"
    assert (nine.wins, nine.win_rate) == (9, None)
    assert nine.why_nothing == "people judged 9 of 20 prompts, but 10 are needed"
    assert ten.verdict == "better"
    votes = [vote(about) for about in PAIRS[:12]]
    newer = [pair(number, dpo=f"Another {number}") for number in range(1, 11)] + PAIRS[10:]
    whole = row_by_people(votes, newer)
    assert (whole.people.judged, whole.people.votes, whole.people.stale) == (2, 2, 10)
    assert "10 votes are for other answers" in whole.why_nothing
    others = [vote(pair(1), annotator="x")]
    assert votes_on(others, DPO, "base", PAIRS).stale == 0, "those on other arms are not of this pair"


def test_where_identical_answers_leave_too_few_prompts_the_remedy_is_more_of_them() -> None:
    for votes, pairs, why in (
        (2, MIXED, "people judged 2 of the 6 prompts with different answers, but 10 are needed"),
        (6, MIXED, "people judged all 6 prompts with different answers, so nothing is left to judge"),
        (0, MIXED[6:], "all 10 prompts have identical answers, so there is nothing to judge"),
    ):
        reason = row_by_people([vote(about) for about in pairs[:votes]], pairs).why_nothing
        assert reason.startswith(why)
        assert reason.endswith("evaluate on more held-out prompts")


def test_equal_answers_are_ties_as_far_as_people_have_come() -> None:
    """Ten prompts of twenty have equal answers; those that come before the last judged one count, and no others."""
    mixed = [pair(number, sft="same", dpo="same ") if number % 2 else pair(number) for number in range(1, 21)]
    ordered = queue(mixed)
    open_pairs = [about for about in ordered if not about.same]
    assert all(points is None for points in voted([], mixed).points()), "nothing is judged, so nothing counts"
    before = sum(about.same for about in ordered[: ordered.index(open_pairs[4])])
    points = voted([vote(about) for about in open_pairs[:5]], mixed).points()
    assert [points.count(value) for value in (1.0, 0.5, None)] == [5, before, 15 - before]
    whole = row_by_people([vote(about) for about in open_pairs], mixed)
    assert (whole.wins, whole.ties, whole.win_rate.mean, whole.people.same_answers) == (10, 10, 0.75, 10)


def test_agreement_leaves_out_answers_that_are_identical() -> None:
    votes = [vote(about) for about in MIXED[:6]]
    whole = row_by_people(votes, MIXED, by_metric=[1.0, *[0.0] * 5, *[0.5] * 10])
    assert (whole.wins, whole.ties, whole.metric_prompts) == (6, 10, 6)
    assert whole.metric_agreement == pytest.approx(1 / 6)
    assert whole.metric_kappa == pytest.approx(0.0), "whoever always prefers the same arm agrees by chance only"
    nothing = row_by_people([], MIXED, by_metric=[0.5] * 16)
    assert (nothing.metric_agreement, nothing.metric_kappa, nothing.metric_prompts) == (None, None, None)
    votes = [vote(about, choice, annotator=name) for about in PAIRS[:4] for name, choice in (("ada", DPO), ("bo", SFT))]
    same = [pair(number, sft="same", dpo="same") for number in range(30, 60)]
    assert voted(votes, [*PAIRS, *same]).alpha() == voted(votes).alpha()


PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Four observers and twelve units (Krippendorff 2011, section D), whose ordinal α is given there as .815."""


def test_alpha_is_that_of_its_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    observers = [line.split() for line in PUBLISHED.strip().splitlines()]
    units = [[float(value) for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha([[1.0, 1.0], [0.0, 0.0]]) == 1.0
    alone: list[list[float]] = [[1.0], [0.0]]
    assert krippendorff_alpha(alone) is krippendorff_alpha([[1.0, 1.0], [0.0]]) is krippendorff_alpha([]) is None
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    with pytest.raises(ConfigError, match="krippendorff>="):
        krippendorff_alpha([[1.0, 0.0]])


def test_the_order_of_prompts_is_the_same_for_all_and_no_arm_is_always_first() -> None:
    pairs = pairs_of_samples([sample(number) for number in range(1, 21)], ARMS)
    assert [about.key for about in pairs] == [about.key for about in PAIRS]
    ordered = queue([*pairs, *pairs])
    assert queue(reversed(pairs)) == ordered, "each pair once, in the order of the hashes"
    assert sorted(about.id for about in ordered) == sorted(about.id for about in pairs)
    assert ordered != pairs
    drawn = [shown_first(pair(number), name) for number in range(1, 101) for name in ("ada", "bo")]
    assert 80 <= drawn.count(SFT) <= 120
    assert drawn[0] == shown_first(pair(1), "ada")
    assert drawn[::2] != drawn[1::2]
