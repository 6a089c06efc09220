"""SFT on narrow data at a high rate trips the gate of the recipe ``replay``, and with a fifth of replay it passes.

Each run is the user's command on the bundled model. Draws docs/forgetting.svg.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.report.run_page.run_records import Interval
from tests.e2e.conftest import environment
from tests.proofs.common import Claim
from tests.proofs.drawing import Row, draw_intervals

FIGURE = Path(__file__).parents[2] / "docs/forgetting.svg"
SEEDS = (42, 1)
WAYS = {"none": ("stages.sft.data.mix=[]",), "replay": ()}
"""The recipe without what is mixed in, and as it is."""
NAMES = {"none": "without replay", "replay": "a fifth of replay"}
ALONE = ("~stages.evaluate", "~stages.report", "launch.threads=1")
Found = Mapping[tuple[str, int], Mapping[str, Any]]
"""Way and seed → the content of ``forgetting.json``."""


def run(folder: Path) -> list[Claim]:
    """Both ways, from each seed."""
    codes = {(way, seed): _align(folder, way, seed) for way in WAYS for seed in SEEDS}
    found = {one: outcome_of(folder, *one) for one in codes}
    figure(found)
    limit = found["none", SEEDS[0]]["limits"]["perplexity_rise"]
    without, replayed = ([found[way, seed]["arms"][1] for seed in SEEDS] for way in WAYS)
    return [
        Claim(figure="exit code without replay", values=_codes(codes, "none"), at_least=10, at_most=10),
        Claim(figure="exit code with a fifth of replay", values=_codes(codes, "replay"), at_most=0),
        Claim(figure="rise of perplexity without replay", values=_means(without, "rise"), at_least=limit),
        Claim(figure="rise of perplexity with a fifth of replay", values=_means(replayed, "rise"), at_most=limit),
    ]


def outcome_of(folder: Path, way: str, seed: int) -> dict[str, Any]:
    """What the run measured."""
    record = json.loads((folder / f"runs/{way}-{seed}/run.json").read_text(encoding="utf-8"))
    artifact = Path(record["stages"]["forgetting"]["artifact"])
    told: dict[str, Any] = json.loads((artifact / "forgetting.json").read_text(encoding="utf-8"))
    return told


def figure(found: Found) -> None:
    """Both figures of each run beside their limits."""
    limits = next(iter(found.values()))["limits"]
    draw_intervals(
        FIGURE,
        {
            "Rise of the perplexity of general text, share of the base's": (
                _rows(found, "rise"),
                limits["perplexity_rise"],
            ),
            "Drop of right answers, share of the questions": (_rows(found, "drop"), limits["ability_drop"]),
        },
        below="after SFT on 96 narrow rows at a rate of 6.5e-3, with 95 % intervals; dotted: the limit",
    )


def _rows(found: Found, what: str) -> list[Row]:
    return [
        Row(name=f"{NAMES[way]}, {seed}", interval=Interval(**told["arms"][1][what]), tone=f"s{list(WAYS).index(way)}")
        for (way, seed), told in found.items()
    ]


def _align(folder: Path, way: str, seed: int) -> int:
    argv = [sys.executable, "-m", "alignment.cli", "run", "replay", *ALONE, *WAYS[way]]
    argv += [f"output={folder}", f"name={way}-{seed}", f"seed={seed}"]
    return subprocess.run(argv, capture_output=True, env=environment(), check=False).returncode


def _codes(codes: Mapping[tuple[str, int], int], way: str) -> tuple[float, ...]:
    return tuple(float(code) for (name, _), code in codes.items() if name == way)


def _means(arms: list[dict[str, Any]], what: str) -> tuple[float, ...]:
    return tuple(float(arm[what]["mean"]) for arm in arms)
