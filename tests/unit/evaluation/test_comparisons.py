"""Which arms are compared, and which of their differences are called real."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.evaluation.bootstrap import Intervals, detectable
from alignment.evaluation.comparisons import compare
from alignment.records.evaluation import BETTER, NO_DIFFERENCE, WORSE, Comparison, Evaluation, Metric

INTERVALS = Intervals(samples=500, seed=3)
LOW, HIGH = [0.1, 0.2, 0.3, 0.2] * 5, [0.8, 0.9, 0.7, 0.9] * 5
BREVITY = {
    "base": LOW,
    "base+prompt": LOW[::-1],
    "stage:sft": HIGH,
    "stage:dpo": [value + 0.05 for value in HIGH],
    "stage:ppo": HIGH[::-1],
}


def by_arm(reference: str = "stage:sft") -> dict[tuple[str, str], Comparison]:
    pairs = compare({"brevity": BREVITY}, reference=reference, intervals=INTERVALS)
    return {(pair.arm, pair.against): pair for pair in pairs}


def test_every_trained_arm_meets_the_untrained_ones_the_reference_and_the_other_trained_ones() -> None:
    assert set(by_arm()) == {
        ("base+prompt", "base"),
        *((f"stage:{arm}", untrained) for arm in ("sft", "dpo", "ppo") for untrained in ("base", "base+prompt")),
        ("stage:dpo", "stage:sft"),
        ("stage:ppo", "stage:sft"),
        ("stage:ppo", "stage:dpo"),
    }


def test_no_arm_meets_itself_or_another_twice() -> None:
    pairs = list(by_arm("base"))
    assert pairs[0] == ("base+prompt", "base")
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(arm != against for arm, against in pairs)


def test_arms_that_were_not_asked_for_are_not_compared() -> None:
    assert compare({"brevity": {"base": [0.5]}}, reference="stage:sft", intervals=INTERVALS) == []
    assert compare({}, reference="stage:sft", intervals=INTERVALS) == []


def test_a_constant_gain_is_real_and_a_shuffle_is_not() -> None:
    dpo, ppo = by_arm()["stage:dpo", "stage:sft"], by_arm()["stage:ppo", "stage:sft"]
    assert dpo.difference == pytest.approx(0.05)
    assert dpo.real
    assert ppo.difference == pytest.approx(0.0)
    assert not ppo.real
    assert (ppo.low, ppo.high) == INTERVALS.of_difference(BREVITY["stage:ppo"], BREVITY["stage:sft"]).bounds
    assert ppo.low < 0.0 < ppo.high
    assert dpo.high - dpo.low == pytest.approx(0.0, abs=1e-9), "differences are paired: a constant gain has no width"


def test_the_same_difference_is_real_alone_and_may_be_chance_among_many() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.0, 1.0, 60)
    gain = rng.normal(0.0, 1.0, 60)
    arm = base + gain - gain.mean() + 0.29
    alone = compare(
        {"total": {"base": base.tolist(), "stage:sft": arm.tolist()}}, reference="stage:sft", intervals=INTERVALS
    )
    assert [pair.real for pair in alone] == [True]
    null = {f"null {number}": rng.normal(0.0, 1.0, 60).tolist() for number in range(19)}
    scores = {"total": {"base": base.tolist(), "stage:sft": arm.tolist()}}
    scores |= {name: {"base": [0.0] * 60, "stage:sft": values} for name, values in null.items()}
    among = compare(scores, reference="stage:sft", intervals=INTERVALS)
    (total,) = (pair for pair in among if pair.metric == "total")
    assert len(among) == 20
    assert total.detectable is not None
    of_twenty = (3.0233 + 0.8416) / (1.96 + 0.8416)  # quantiles of .05 / 20 and of .05, each with a power of 80 %
    assert total.detectable / (alone[0].detectable or 0.0) == pytest.approx(of_twenty, rel=1e-4)
    assert total.p is not None
    assert total.adjusted_p is not None
    assert total.p < 0.05 < total.adjusted_p
    assert total.interval.excludes_zero()
    assert not total.real


def test_a_verdict_is_in_the_direction_of_its_metric() -> None:
    errors = Metric(name="errors", higher_is_better=False)
    evaluation = Evaluation(metrics=[Metric(name="total"), errors], primary="total")
    more = Comparison(arm="a", against="b", difference=0.5, low=0.4, high=0.6, p=0.001, adjusted_p=0.01)
    assert evaluation.verdict(more) == BETTER
    assert evaluation.verdict(more.turned()) == WORSE
    of_errors = Comparison(
        arm="a", against="b", metric="errors", difference=0.5, low=0.4, high=0.6, p=0.001, adjusted_p=0.01
    )
    assert evaluation.verdict(of_errors) == WORSE
    chance = Comparison(arm="a", against="b", difference=0.5, low=0.4, high=0.6, p=0.03, adjusted_p=0.05)
    assert evaluation.verdict(chance) == NO_DIFFERENCE


def test_a_comparison_of_before_there_were_p_values_goes_by_its_interval() -> None:
    assert Comparison(arm="a", against="b", difference=0.5, low=0.4, high=0.6).real
    assert not Comparison(arm="a", against="b", difference=0.5, low=-0.1, high=1.1).real
    assert Comparison(arm="a", against="b", difference=0.5, low=0.4, high=0.6).p_in_words == ""


def test_metrics_over_other_prompts_are_one_family() -> None:
    """As tasks with other numbers of rows: each p value is that of its metric alone, and all are corrected together."""
    short = {name: values[:8] for name, values in BREVITY.items() if name in ("stage:sft", "stage:dpo")}
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
