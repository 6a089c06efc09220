"""What votes of people amount to: points, intervals, agreement, and what nobody judged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import permutations

import pytest

from alignment.core.errors import ConfigError
from alignment.evaluation.annotator_agreement import krippendorff_alpha
from alignment.evaluation.answer_pairs import AnswerPair, pairs_of_samples, queue, shown_first
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.votes_on_pairs import VotesOnPair, row_of, votes_on
from alignment.records.evaluation import JudgedPair
from alignment.records.votes import TIE, Vote
from tests.judged import ARMS, DPO, SFT, pair, sample, vote

INTERVALS = Intervals(samples=400, seed=1)
PAIRS = [pair(number) for number in range(1, 21)]


def row(judged: VotesOnPair, *, by_metric: Sequence[float] | None = None) -> JudgedPair:
    words = [float(number % 4 - 1.5) for number in range(len(judged.pairs))]
    return row_of(judged, extra_words=words, by_metric=by_metric, intervals=INTERVALS)


def of(votes: Sequence[Vote], pairs: Sequence[AnswerPair] = PAIRS) -> VotesOnPair:
    return votes_on(votes, DPO, SFT, pairs)


def test_a_prompt_counts_once_with_the_mean_of_its_votes() -> None:
    votes = [vote(PAIRS[0]), vote(PAIRS[0], SFT, annotator="bo"), vote(PAIRS[0], annotator="cy")]
    votes += [vote(PAIRS[1]), vote(PAIRS[1], TIE, annotator="bo"), vote(PAIRS[2], TIE)]
    assert of(votes).points()[:4] == [pytest.approx(2 / 3), 0.75, 0.5, None]
    against = votes_on(votes, SFT, DPO, PAIRS)
    assert against.points()[:4] == [pytest.approx(1 / 3), 0.25, 0.5, None]


def test_the_row_has_the_rate_of_the_prompts_that_were_judged() -> None:
    preferred = [DPO] * 7 + [TIE] * 2 + [SFT] * 3
    votes = [
        vote(about, choice, annotator=name)
        for about, choice in zip(PAIRS, preferred, strict=False)
        for name in ("ada", "bo")
    ]
    judged_pair = row(of(votes))
    assert judged_pair.length_controlled is not None
    assert (judged_pair.wins, judged_pair.ties, judged_pair.losses, judged_pair.prompts) == (7, 2, 3, 20)
    assert judged_pair.win_rate is not None
    assert judged_pair.win_rate.bounds is not None
    assert judged_pair.win_rate.mean == pytest.approx((7 + 1) / 12)
    assert judged_pair.win_rate.bounds[0] < 8 / 12 < judged_pair.win_rate.bounds[1]
    assert judged_pair.people is not None
    assert (judged_pair.people.judged, judged_pair.people.votes, judged_pair.people.annotators) == (12, 24, 2)
    assert judged_pair.verdict == "no real difference"
    assert row(of([vote(about) for about in PAIRS])).verdict == "better"


def test_the_interval_is_over_prompts_and_not_over_votes() -> None:
    """Ten annotators who agree on ten prompts know no more of other prompts than one does."""
    alone = [vote(about, DPO if number % 3 else SFT) for number, about in enumerate(PAIRS)]
    many = [
        vote(about, DPO if number % 3 else SFT, annotator=f"a{name}")
        for number, about in enumerate(PAIRS)
        for name in range(10)
    ]
    assert row(of(many)).win_rate == row(of(alone)).win_rate


def test_prompts_that_nobody_judged_are_no_ties() -> None:
    judged_pair = row(of([]))
    assert (judged_pair.wins, judged_pair.ties, judged_pair.losses, judged_pair.win_rate) == (0, 0, 0, None)
    assert judged_pair.verdict == "nothing can be concluded"
    assert judged_pair.why_nothing == "people judged 0 of 20 prompts, but 10 are needed"


def test_too_few_prompts_give_counts_and_no_verdict() -> None:
    nine, ten = (
        row(of([vote(about, annotator=name) for about in PAIRS[:number] for name in ("ada", "bo")]))
        for number in (9, 10)
    )
    assert (nine.wins, nine.win_rate, nine.verdict) == (9, None, "nothing can be concluded")
    assert nine.why_nothing == "people judged 9 of 20 prompts, but 10 are needed"
    assert ten.verdict == "better"


def test_where_identical_answers_leave_too_few_prompts_the_remedy_is_more_of_them() -> None:
    mixed = [pair(number) if number <= 6 else pair(number, sft="same", dpo="same") for number in range(1, 17)]
    few = row(of([vote(about) for about in mixed[:2]], mixed)).why_nothing
    assert few == (
        "people judged 2 of the 6 prompts with different answers, but 10 are needed: evaluate on more held-out prompts"
    )
    every = row(of([vote(about) for about in mixed[:6]], mixed)).why_nothing
    assert every == (
        "people judged all 6 prompts with different answers, so nothing is left to judge, but 10 are needed: evaluate "
        "on more held-out prompts"
    )
    none = row(of([], mixed[6:])).why_nothing
    assert none == (
        "all 10 prompts have identical answers, so there is nothing to judge; evaluate on more held-out prompts"
    )


def test_votes_on_other_answers_are_stale_and_said_to_be() -> None:
    votes = [vote(about) for about in PAIRS[:12]]
    newer = [pair(number, dpo=f"Another {number}") for number in range(1, 11)] + PAIRS[10:]
    judged_pair = row(of(votes, newer))
    assert judged_pair.people is not None
    assert (judged_pair.people.judged, judged_pair.people.votes, judged_pair.people.stale) == (2, 2, 10)
    assert judged_pair.why_nothing.endswith("; 10 votes are for other answers and do not count")
    others = [vote(pair(1), annotator="x")]
    assert votes_on(others, DPO, "base", PAIRS).stale == 0, "those on other arms are not of this pair"


def test_equal_answers_are_ties_as_far_as_people_have_come() -> None:
    """Ten prompts of twenty have equal answers; those that come before the last judged one count, and no others."""
    mixed = [pair(number, sft="same", dpo="same ") if number % 2 else pair(number) for number in range(1, 21)]
    ordered = queue(mixed)
    open_pairs = [about for about in ordered if not about.same]
    assert all(points is None for points in of([], mixed).points()), "nothing is judged, so nothing counts"
    last = open_pairs[4]
    before = sum(about.same for about in ordered[: ordered.index(last)])
    points = of([vote(about) for about in open_pairs[:5]], mixed).points()
    assert points.count(1.0) == 5
    assert points.count(0.5) == before
    assert points.count(None) == 20 - 5 - before
    whole = row(of([vote(about) for about in open_pairs], mixed))
    assert whole.win_rate is not None
    assert (whole.wins, whole.ties, whole.win_rate.mean) == (10, 10, 0.75)
    assert whole.people is not None
    assert whole.people.same_answers == 10


def test_the_position_bias_is_that_of_the_votes() -> None:
    """And not that of an arm: the votes that were for the answer shown first are for either arm."""
    votes = [vote(PAIRS[0], SFT), vote(PAIRS[1], shown_first=DPO), vote(PAIRS[2], TIE)]
    votes.append(vote(PAIRS[3], SFT, shown_first=DPO))
    assert row(of(votes)).position_bias == pytest.approx((1 + 1 + 0 - 1) / 4)


def test_the_metric_is_compared_with_the_side_that_most_prefer() -> None:
    votes = [vote(about) for about in PAIRS[:9]] + [vote(PAIRS[9], annotator=name) for name in ("ada", "bo")]
    votes.append(vote(PAIRS[9], SFT, annotator="cy"))
    judged_pair = row(of(votes), by_metric=[1.0] * 8 + [0.5] * 12)
    assert judged_pair.metric_agreement == pytest.approx(8 / 10)
    assert judged_pair.metric_prompts == 10


def test_agreement_leaves_out_answers_that_are_identical() -> None:
    """Ten of sixteen prompts have identical answers, on which nothing could disagree."""
    mixed = [pair(number) if number <= 6 else pair(number, sft="same", dpo="same") for number in range(1, 17)]
    votes = [vote(about) for about in mixed[:6]]
    judged_pair = row(of(votes, mixed), by_metric=[1.0, *[0.0] * 5, *[0.5] * 10])
    assert (judged_pair.wins, judged_pair.ties, judged_pair.metric_prompts) == (6, 10, 6)
    assert judged_pair.metric_agreement == pytest.approx(1 / 6)
    assert judged_pair.metric_kappa == pytest.approx(0.0), "whoever always prefers the same arm agrees by chance only"
    nothing = row(of([], mixed), by_metric=[0.5] * 16)
    assert (nothing.metric_agreement, nothing.metric_kappa, nothing.metric_prompts) == (None, None, None)


def test_alpha_is_of_votes_and_so_leaves_out_answers_that_are_identical() -> None:
    votes = [vote(about, choice, annotator=name) for about in PAIRS[:4] for name, choice in (("ada", DPO), ("bo", SFT))]
    same = [pair(number, sft="same", dpo="same") for number in range(30, 60)]
    assert of(votes, [*PAIRS, *same]).alpha() == of(votes).alpha()


PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Four observers and twelve units (Krippendorff 2011, section D), whose ordinal α is given there as .815."""


def slow_alpha(units: Sequence[Sequence[float]]) -> float:
    """Krippendorff 2011: α = 1 − D_o / D_e over all pairs of values, with the difference for ordered values."""
    pairable = [unit for unit in units if len(unit) > 1]
    every = [value for unit in pairable for value in unit]

    def difference(low: float, high: float) -> float:
        low, high = sorted((low, high))
        between = sum(low <= value <= high for value in every)
        return float(between - (every.count(low) + every.count(high)) / 2) ** 2

    observed = sum(
        difference(first, second) / (len(unit) - 1) for unit in pairable for first, second in permutations(unit, 2)
    ) / len(every)
    pairs = len(every) * (len(every) - 1)
    return 1.0 - observed / (sum(difference(first, second) for first, second in permutations(every, 2)) / pairs)


def test_alpha_is_that_of_its_paper() -> None:
    observers = [line.split() for line in PUBLISHED.strip().splitlines()]
    units = [[float(value) for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    alpha = krippendorff_alpha(units)
    assert alpha == pytest.approx(0.815, abs=5e-4)
    assert alpha == pytest.approx(slow_alpha(units), rel=1e-9)


def test_alpha_of_votes_is_that_of_the_definition_and_the_same_for_either_arm() -> None:
    prompts = [[1.0, 1.0], [1.0, 0.5], [0.0, 0.0, 0.5], [0.0, 1.0], [0.5, 0.5], [1.0]]
    assert krippendorff_alpha(prompts) == pytest.approx(slow_alpha(prompts), rel=1e-9)
    turned = [[1.0 - point for point in points] for points in prompts]
    assert krippendorff_alpha(turned) == pytest.approx(slow_alpha(prompts), rel=1e-9)
    assert krippendorff_alpha([[1.0, 1.0], [0.0, 0.0]]) == 1.0
    assert (krippendorff_alpha([[1.0, 0.0]] * 6) or 0.0) < 0.0


def test_without_two_annotators_on_a_prompt_or_two_values_there_is_no_alpha() -> None:
    assert krippendorff_alpha([[1.0], [0.0]]) is None
    assert krippendorff_alpha([[1.0, 1.0], [0.0]]) is None
    assert krippendorff_alpha([]) is None


def test_without_its_library_alpha_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    with pytest.raises(ConfigError, match=r"pip install 'krippendorff>=0\.9,<0\.10'"):
        krippendorff_alpha([[1.0, 0.0]])


def test_the_order_is_the_same_for_all_and_has_nothing_to_do_with_the_rows() -> None:
    samples = [sample(number) for number in range(1, 21)]
    pairs = pairs_of_samples(samples, ARMS)
    assert [about.key for about in pairs] == [about.key for about in PAIRS]
    ordered = queue([*pairs, *pairs])
    assert queue(reversed(pairs)) == ordered, "each pair once, in the order of the hashes"
    assert sorted(about.id for about in ordered) == sorted(about.id for about in pairs)
    assert ordered != pairs


def test_an_arm_is_shown_first_about_half_of_the_times_and_the_same_at_every_look() -> None:
    drawn = [shown_first(pair(number), name) for number in range(1, 101) for name in ("ada", "bo")]
    assert 80 <= drawn.count(SFT) <= 120
    assert drawn[0] == shown_first(pair(1), "ada")
    assert drawn[::2] != drawn[1::2]
