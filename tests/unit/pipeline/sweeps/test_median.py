"""The median rule: where a curve stands, and what it is held against."""

from __future__ import annotations

import optuna
import pytest

from alignment.pipeline.sweeps.study import LatestMedian, smoothed


def pruned(
    curve: list[float], others: list[list[float]], *, direction: str = "minimize", warmup_steps: int = 0
) -> bool:
    """Whether a trial with this curve is stopped at its last step beside finished ones with those."""
    study = optuna.create_study(direction=direction)
    for other in others:
        values = dict(enumerate(other, start=1))
        study.add_trial(optuna.trial.create_trial(value=0.0, intermediate_values=values))
    study.pruner = LatestMedian(startup_trials=2, warmup_steps=warmup_steps)
    trial = study.ask()
    for step, value in enumerate(curve, start=1):
        trial.report(value, step)
    return trial.should_prune()


def test_a_curve_stands_at_the_mean_of_its_last_five_values() -> None:
    values = {step: float(step) for step in range(1, 21)}
    assert smoothed(values, 12) == pytest.approx((8 + 9 + 10 + 11 + 12) / 5)
    assert smoothed(values, 2) == pytest.approx(1.5)
    assert smoothed({10: 4.0, 20: 2.0}, 15) == 4.0, "logged more seldom"
    assert smoothed(values, 21) is None, "it ended before"
    assert smoothed({10: 4.0}, 5) is None


GOOD = [0.7, 0.6, 0.5, 0.4, 0.4, 0.4]


@pytest.mark.parametrize(
    ("curve", "is_pruned"),
    [
        ([0.7, 0.6, 0.5, 0.4, 0.4, 0.5], True),  # a little worse on the whole
        ([0.7, 0.6, 0.5, 0.3, 0.3, 0.5], False),  # one bad batch at the end of better ones
        ([0.1, 0.9, 0.9, 0.9, 0.9, 0.9], True),  # its best is long ago
        ([0.9], False),  # before anything was learned
        ([0.9, 0.9], True),
        (GOOD, False),
        ([*GOOD, 9.0], False),  # no finished trial has come so far
    ],
)
def test_a_trial_is_pruned_where_it_stands_worse_than_the_median(curve: list[float], *, is_pruned: bool) -> None:
    assert pruned(curve, [GOOD, GOOD, GOOD]) is is_pruned
    upside_down = [[-value for value in losses] for losses in (curve, GOOD)]
    assert pruned(upside_down[0], [upside_down[1]] * 3, direction="maximize") is is_pruned


def test_the_first_trials_and_steps_are_left_alone() -> None:
    assert not pruned([0.7, 9.0], [GOOD])
    assert not pruned([0.7, 9.0], [GOOD, GOOD], warmup_steps=3)
    assert pruned([0.7, 9.0, 9.0], [GOOD, GOOD], warmup_steps=3)
