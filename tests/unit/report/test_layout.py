"""Pages as a browser lays them out: on a wide screen and on a telephone nothing is cut off at the side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.records.interval import Interval
from alignment.records.sweep_record import Goal, Parameter
from alignment.report.sweep_page.sweep_report import build_sweep
from tests.browser import Layout, browser, layouts_of
from tests.unit.report.conftest import FakeRun
from tests.unit.report.test_comparison import Compared
from tests.unit.report.test_sweep_page import RANK, RATE, record
from tests.unit.report.test_tables import judged_by_people, made_card, with_card

WIDTHS = (1280, 390)


def report_with_everything(folder: Path) -> Path:
    """A report whose arms have every figure, with a judge and a guard."""
    run = FakeRun(folder)
    span = {"mean": -12.34, "low": -13.31, "high": -11.36}
    for arm in run.evaluation["arms"]:
        arm |= dict.fromkeys(("reward", "greedy_log_ratio", "loss", "perplexity"), span)
        arm |= {name: {"mean": 0.21, "low": 0.12, "high": 0.31} for name in ("refusals", "ended")}
    pair = {"arm": "stage:dpo", "against": "base+prompt", "wins": 50, "ties": 24, "losses": 26, "agreement": 0.81}
    pair |= {"win_rate": {"mean": 0.62, "low": 0.53, "high": 0.71}, "verdict": "better", "invalid": 0.0}
    run.evaluation["judge"] = {"name": "a judge", "num_prompts": 100, "pairs": [pair]}
    for step, row in enumerate(run.metrics["ppo"]):
        row |= {"guard/proxy": 0.1 * step, "guard/scorer": 0.5 - 0.01 * step, "guard/kl": 4.0 * step}
    run.html()
    return run.root / "report.html"


def sweep_of_many_settings(folder: Path) -> Path:
    """A sweep with two figures and five settings, one of them a list."""
    lists = ['["q_proj", "v_proj"]', '["all-linear"]']
    more = [
        Parameter(key="stages.sft.adapter.target_modules", values=lists, low=None, high=None, log=False),
        Parameter(key="stages.dpo.beta", values=["0.05", "0.1", "0.3", "0.5"], low=None, high=None, log=False),
        Parameter(key="stages.dpo.optim.batch_size", values=["4", "8"], low=None, high=None, log=False),
    ]
    chosen = {more[0].key: lists[1], more[1].key: "0.1", more[2].key: "8"}
    arms = {"base": Interval(mean=0.1), "a-model-with-a-rather-long-name-of-48-characters": Interval(mean=0.5)}
    goals = [
        Goal(label="quality of stage:sft", minimize=False, shared_arms=arms),
        Goal(label="rewards/margins of dpo", minimize=False),
    ]
    trials = [
        replace(
            trial,
            settings=trial.settings | chosen,
            figures=[*trial.figures, Interval(mean=1.25)] if trial.figures else [],
        )
        for trial in record().trials
    ]
    sweep = record(parameters=[RATE, RANK, *more], goals=goals, trials=trials, importance=[])
    build_sweep(sweep, folder / "sweep.html")
    return folder / "sweep.html"


def comparison_of_three(folder: Path) -> Path:
    """Runs whose settings differ in a list."""
    compared = Compared(folder, 3)
    modules = ["all-linear", "q_proj", "k_proj", "v_proj", "o_proj"]
    compared.settings["stages.sft.adapter.target_modules"] = [json.dumps(modules[: index + 1]) for index in range(3)]
    compared.html()
    return folder / "page.html"


def card(folder: Path) -> Path:
    """A report with a reward model's card."""
    run = FakeRun(folder)
    with_card(run, made_card())
    return run.root / "report.html"


def report_with_people(folder: Path) -> Path:
    """A report whose judges are people."""
    run = FakeRun(folder)
    judged_by_people(run)
    run.html()
    return run.root / "report.html"


PAGES: dict[str, Any] = {
    "report": report_with_everything,
    "people": report_with_people,
    "sweep": sweep_of_many_settings,
    "comparison": comparison_of_three,
    "card": card,
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Layout]]:
    """Every page at every width, measured by one browser."""
    if browser() is None:
        pytest.skip("no Chromium: nothing was laid out")
    pages = [make(tmp_path_factory.mktemp(name)) for name, make in PAGES.items()]
    return dict(zip(PAGES, layouts_of(pages, widths=WIDTHS), strict=True))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_at_the_side(layouts: dict[str, list[Layout]], page: str, width: int) -> None:
    layout = layouts[page][WIDTHS.index(width)]
    assert (layout.page, layout.cut) == (width, [])
