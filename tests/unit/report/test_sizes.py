"""The primary metric over the number of rows: drawn where arms differ in the amount of their data, and nowhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest

PARTS = {"sft_25": (75.0, 0.41), "sft_50": (150.0, 0.5), "sft": (300.0, 0.62)}
SPOKEN = 'aria-label="sft, quality over rows: '


def identity(stage: str) -> dict:
    """What defines a part's result, as its manifest holds it."""
    data = {"fraction": PARTS[stage][0] / 300, "limit": None}
    return {
        "stage": stage,
        "kind": "sft",
        "config": {"kind": "sft", "data": data, "optim": {"lr": 5e-4, "epochs": 2}, "max_length": 1024},
        "data": "5" * 64,
        "inputs": {"init": "b" * 64},
        "seed": 42,
    }


@pytest.fixture
def parts(fake_run):
    """The ordinary run with SFT on a quarter and on half of its conversations besides."""
    stages, arms = fake_run.run["stages"], fake_run.evaluation["arms"]
    for name, (rows, quality) in PARTS.items():
        stages.setdefault(name, {**stages["sft"], "artifact": f"{name}-0123abcd"})
        fake_run.headlines[name] = {"loss": 1.4, "rows": rows}
        fake_run.identities[name] = identity(name)
        if name != "sft":
            bounds = {"mean": quality, "low": quality - 0.05, "high": quality + 0.05}
            arms.append({"name": f"stage:{name}", "label": name, "metrics": {"quality": bounds}})
    return fake_run


def drawing(html: str) -> str:
    """The inside of the only figure of this kind."""
    (figure,) = re.findall(SPOKEN + r".*?</svg>", html, re.DOTALL)
    return figure


def test_parts_of_the_same_data_are_drawn_from_least_to_most(parts):
    html = parts.html()
    assert f'{SPOKEN}0.41 at 75, 0.50 at 150, 0.62 at 300"' in html
    assert re.findall(r'text-anchor="middle">(.*?)</text>', drawing(html)) == ["75", "150", "300"]
    assert drawing(html).count('<path class="raw s0"') == 3, "an interval each"
    assert drawing(html).count('class="guide"') == 1
    assert "dotted: base, where each run starts; each point is one run, so the variation" in html
    assert "settings differ too" not in html
    left, middle, right = map(float, re.findall(r'<circle class="dot s0" cx="([\d.]+)"', drawing(html)))
    assert middle - left == pytest.approx(right - middle, abs=0.11), "doublings"


CHANGES: dict[str, Any] = {
    "no quality": lambda run: run.evaluation["arms"][-1].update(metrics={}),
    "as many rows": lambda run: run.headlines.update(sft_50=run.headlines["sft"]),
    "other data": lambda run: run.identities["sft_50"].update(data="6" * 64),
    "other rows of it": lambda run: run.identities["sft_50"]["config"]["data"].update(source="path:other"),
    "other setting": lambda run: run.identities["sft_50"]["config"].update(max_length=512),
    "unfinished": lambda run: run.run["stages"]["sft_50"].update(state="failed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_arms_that_show_nothing_about_the_amount_are_not_drawn(parts, change):
    parts.drop_arms(["base", "stage:sft", "stage:sft_50"])
    assert SPOKEN in parts.html()
    CHANGES[change](parts)
    (parts.artifact("sft_50") / "manifest.json").unlink()  # a folder that an earlier state left is none of the run's
    assert SPOKEN not in parts.html()


def test_other_epochs_for_fewer_rows_are_drawn_and_said_and_a_limit_is_an_amount_as_well(parts):
    parts.identities["sft_25"]["config"]["optim"] = {"lr": 5e-4, "epochs": 8}
    parts.identities["sft_25"]["config"]["data"] = {"fraction": 1, "limit": 75}
    html = parts.html()
    assert "0.41 at 75" in drawing(html)
    assert "the optimiser’s settings differ too" in html
