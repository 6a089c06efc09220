"""The page about a sweep: what it says, its plots, safe against hostile text, nothing to complain of in a browser."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from alignment.records.interval import Interval
from alignment.records.sweep_record import Goal, Parameter, SweepRecord, Trial
from alignment.report.sweep_page.sweep_report import log_ticks, of_parameter, sweep_page
from tests.unit.report.conftest import HOSTILE, REQUESTS, TAGS, Page

RATE = Parameter(key="stages.sft.optim.lr", values=[], low=1e-5, high=2e-3, log=True)
RANK = Parameter(key="stages.sft.adapter.rank", values=["4", "16", "64"], low=None, high=None, log=False)


def trial(number: int, lr: float, rank: str, mean: float | None, **more: object) -> Trial:
    figures = [] if mean is None else [Interval(mean=mean, low=mean - 0.05, high=mean + 0.05)]
    words = [f"stages.sft.optim.lr={lr:.6g}", f"stages.sft.adapter.rank={rank}"]
    settings = {RATE.key: lr, RANK.key: rank}
    fields = {"state": "done", "figures": figures, "run": f"quickstart.mine.{number}", **more}
    return Trial(number=number, settings=settings, words=words, **fields)  # type: ignore[arg-type]


def record(**changes: object) -> SweepRecord:
    done = [trial(n, 1e-5 * 1.7**n, ["4", "16", "64"][n % 3], round(0.6 - 0.01 * (n - 6) ** 2, 3)) for n in range(10)]
    ranked = sorted(done, key=lambda finished: -finished.figures[0].mean)
    failed = trial(10, 1.9e-3, "64", None, state="failed", error="stage sft: a gradient is not finite\n  → lower it")
    pruned = trial(11, 1.1e-5, "4", None, state="pruned", error="loss of sft was worse than the median at step 9")
    sweep = SweepRecord(
        name="quickstart.mine",
        recipe="quickstart",
        overrides=["seed=7"],
        summary="rate and rank of SFT's adapter",
        search="tpe",
        number=12,
        goals=[Goal(label="quality of stage:sft", minimize=False)],
        parameters=[RATE, RANK],
        trials=[*ranked, failed, pruned],
        best=[6],
        verdict="trials 5, 7 may be as good: the difference is within chance",
        importance=[{RANK.key: 0.2, RATE.key: 0.8}],
    )
    return replace(sweep, **changes)  # type: ignore[arg-type]


def words(html: str) -> str:
    return " ".join(Page(html).words)


def test_the_best_stands_first_with_its_interval_and_words_to_paste() -> None:
    html = sweep_page(record())
    text = words(html)
    assert "Best quality of stage:sft: 0.600 (0.550 to 0.650), in trial 6." in text
    assert "Trials 5, 7 may be as good" in text
    assert '<pre class="command">stages.sft.optim.lr=0.000241376 stages.sft.adapter.rank=4</pre>' in html
    assert "align run quickstart seed=7 stages.sft.optim.lr=0.000241376 stages.sft.adapter.rank=4" in text
    assert "10 done, 1 failed, 1 pruned of 12" in text
    assert "quality of stage:sft, the more the better" in text
    importance = text[text.index("Which settings matter") :]
    assert importance.index("sft.optim.lr") < importance.index("sft.adapter.rank")
    assert "a gradient is not finite" in text
    assert "worse than the median at step 9" in text


def test_every_trial_is_a_line_and_every_figure_a_dot() -> None:
    html = sweep_page(record())
    (drawing,) = re.findall(r'<svg class="parallel".*?</svg>', html, flags=re.DOTALL)
    lines = re.findall(r'<path class="trial (\w+)"', drawing)
    assert len(lines) == 12
    assert lines[-1] == "best", "drawn last, so that it lies on top"
    assert {"failed", "pruned", "shade1", "shade4"} <= set(lines)
    assert html.count('<circle class="dot s0"') == 2 * 9, "one over each of two settings"
    assert html.count('<circle class="dot s1"') == 2


def test_axes_are_logarithmic_for_ranges_that_are_and_even_for_listed_values() -> None:
    axis = of_parameter(RATE)
    assert [label for _, label in axis.ticks] == ["1e-05", "0.0001", "0.001"]
    assert axis.position(math.sqrt(1e-5 * 2e-3)) == pytest.approx(0.5)
    assert [axis.position(value) for axis in [of_parameter(RANK)] for value in ("4", "16", "64")] == [0.0, 0.5, 1.0]
    assert log_ticks(0.02, 0.6) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5])
    assert log_ticks(0.11, 0.12) == [0.11, 0.12]
    narrow = of_parameter(replace(RATE, low=1000.1, high=1000.4))
    assert [label for _, label in narrow.ticks] == ["1000.1", "1000.4"]
    plain = of_parameter(replace(RATE, low=0.0, high=4.0, log=False))
    assert plain.position(1.0) == 0.25


def with_arms(**means: float) -> Goal:
    """The goal, with arms that all trials share."""
    arms = {label: Interval(mean=mean, low=mean - 0.02, high=mean + 0.02) for label, mean in means.items()}
    return Goal(label="quality of stage:sft", minimize=False, shared_arms=arms)


def test_arms_that_all_trials_share_are_named_and_the_best_of_them_is_a_dotted_line() -> None:
    html = sweep_page(record(goals=[with_arms(base=0.101, prompted=0.45)]))
    assert (
        "The same in all trials, to compare with quality of stage:sft: "
        "base 0.101 (0.081 to 0.121) and prompted 0.450 (0.430 to 0.470)."
    ) in words(html)
    plots = html.split('<div class="multiples">')[1]
    assert plots.count('class="guide"') == 2, "one for each of two settings"
    assert plots.count("quality of stage:sft; dotted: prompted 0.450") == 2
    less = replace(with_arms(base=0.101, prompted=0.45), minimize=True)
    assert sweep_page(record(goals=[less])).count("dotted: base 0.101") == 2
    far_below = sweep_page(record(goals=[with_arms(base=-1.0)]))
    assert "base −1.000" in words(far_below)
    assert 'class="guide"' not in far_below, "it would press the trials together"
    assert "dotted: " not in far_below
    assert "The same in all trials" not in sweep_page(record())


@pytest.mark.parametrize("trials", [0, 1, 2])
def test_a_sweep_that_has_just_begun_says_what_is_missing(trials: int) -> None:
    sweep = record(trials=record().trials[:trials], best=[6][:trials], verdict="", importance=[])
    html = sweep_page(sweep)
    text = words(html)
    assert ("Drawn once 2 trials have finished" in text) == (trials < 2)
    assert html.count('<circle class="dot s1"') == (2 if trials == 2 else 0)
    assert ("No trial has ended yet." in text) == (trials == 0)


def test_text_from_outside_stays_text() -> None:
    hostile = HOSTILE
    rank = replace(RANK, key=hostile, values=[hostile])
    failed = replace(record().trials[-1], error=hostile, settings={RATE.key: 1e-4, hostile: hostile}, words=[hostile])
    done = [
        replace(finished, settings={RATE.key: 1e-4, hostile: hostile}, words=[hostile]) for finished in record().done
    ]
    goals = [Goal(label=hostile, minimize=False, shared_arms={hostile: Interval(mean=0.5)})]
    sweep = record(name=hostile, recipe=hostile, summary=hostile, goals=goals, verdict=hostile, overrides=[hostile])
    html = sweep_page(replace(sweep, parameters=[RATE, rank], trials=[*done, failed]))
    page = Page(html)
    assert page.text.count(" ".join(hostile.split())) >= len(done)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not {name for _, attributes in page.tags for name in attributes} & REQUESTS
    assert "default-src 'none'" in html
