"""Curves: ticks at round numbers, gaps where values are not finite, spikes kept, and small whatever the length."""

from __future__ import annotations

import math
import re

import pytest

from alignment.records.interval import Interval
from alignment.report.kit import text
from alignment.report.kit.plots import (
    BOTTOM,
    HEIGHT,
    TOP,
    interval_curve,
    nice_ticks,
    padded,
    smoothed,
    thinned,
    tick_labels,
)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.023, 0.004, ["−0.02", "−0.01", "0.00"]),
        (1, 60_000, ["20k", "40k", "60k"]),
        (12_345.0, 12_346.0, ["12345", "12345.2", "12345.4", "12345.6", "12345.8", "12346"]),
        (1e-6, 5e-6, ["1.0e-6", "2.0e-6", "3.0e-6", "4.0e-6", "5.0e-6"]),
    ],
)
def test_ticks_stand_at_round_numbers_and_tell_them_apart(low, high, labels):
    assert tick_labels(nice_ticks(low, high, 5)) == labels


@pytest.mark.parametrize("guide", [-5.0, 4.0])
def test_a_guide_outside_all_values_lies_inside_the_plot(guide):
    """A metric without bounds, such as a reward, may have started far from where every run ended."""
    points = [(100, Interval(mean=-3.0, low=-3.2, high=-2.8)), (1000, Interval(mean=-2.0, low=-2.1, high=-1.9))]
    drawn = interval_curve(points, title="reward", guide=guide)
    (height,) = re.findall(r'class="guide" d="M[\d.]+ (-?[\d.]+)H', drawn)
    assert TOP <= float(height) <= HEIGHT - BOTTOM


def test_a_loss_that_is_constant_but_for_rounding_is_drawn_as_one():
    """float32's ln 2: ticks within its last digits would all read 0.693."""
    low, high = padded([0.69314718, 0.69314715, 0.6931472])
    assert (low, high) == pytest.approx((0.6238, 0.7625), abs=1e-3)
    assert padded([0.69, 0.70]) == pytest.approx((0.6894, 0.7006))


def test_thinning_keeps_spikes_gaps_and_order():
    points = [(float(i), 1.0) for i in range(5000)]
    points[1234], points[4000] = (1234.0, 99.0), (4000.0, None)
    drawn = thinned(points, 420)
    assert len(drawn) <= 430
    assert (1234.0, 99.0) in drawn
    assert (4000.0, None) in drawn
    assert drawn == sorted(drawn, key=lambda point: point[0])


def test_smoothing_keeps_a_constant_and_a_gap_and_follows_without_lag():
    constant = [(float(i), 2.0) for i in range(50)]
    assert smoothed(constant) == constant
    gapped = [*constant[:9], (9.0, None), *constant[10:]]
    assert smoothed(gapped) == gapped
    line = [(float(i), float(i)) for i in range(100)]
    assert smoothed(line)[50] == (50.0, 50.0)
    assert smoothed([*line[:50], (50.0, None), *line[51:]])[50] == (50.0, None)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, "NaN"])
def test_a_value_that_is_not_finite_becomes_a_gap_and_is_said(fake_run, bad):
    fake_run.metrics["ppo"][7]["objective/kl"] = bad
    html = fake_run.html()
    assert "1 value was not finite; the lines have gaps there." in html
    kl = html.split('aria-label="ppo, KL to the reference')[1].split("</svg>")[0]
    assert re.search(r'<path class="line s0" d="([^"]*)"', kl).group(1).count("M") == 2
    assert "nan" not in kl
    assert "inf" not in kl


def test_a_kl_coefficient_is_drawn_only_where_it_moves(fake_run):
    assert "KL coefficient" not in fake_run.html()
    fake_run.metrics["ppo"][3]["objective/kl_coef"] = 0.07
    assert 'aria-label="ppo, KL coefficient' in fake_run.html()


@pytest.mark.parametrize(
    ("write", "cases"),
    [
        (
            text.compact,
            {0.693147: "0.693", -41.23: "−41.2", 12_400: "12.4k", 3.1e-5: "3.1e-5", 0: "0", 0.0165: "0.0165"},
        ),
        (text.duration, {0.04: "0.0_s", 41: "41_s", 252: "4_min 12_s", 3900: "1_h 05_min"}),
        (text.share, {1.0: "100_%", 0.997: "99.7_%", 0.62: "62_%", 0.0: "0_%", 0.002: "0.2_%"}),  # none reads as all
    ],
)
def test_numbers_durations_and_shares_are_short(write, cases):
    assert {value: write(value).replace("\u202f", "_") for value in cases} == cases
