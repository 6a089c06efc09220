"""SFT on narrow data at a high rate trips the gate of the recipe ``replay``, and with a fifth of replay it passes.

Each run is the user's command on the bundled model. Draws docs/forgetting.svg.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignment.records.interval import Interval
from alignment.records.run import RunRecord
from alignment.records.stages import ArmForgetting, Forgetting
from tests.e2e.conftest import environment
from tests.proofs.common import Claim
from tests.proofs.drawing import Row, draw_intervals

FIGURE = Path(__file__).parents[2] / "docs/forgetting.svg"
SEEDS = (42, 1)
WAYS = {"none": ("stages.sft.data.mix=[]",), "replay": ()}
"""The recipe without what is mixed in, and as it is."""
NAMES = {"none": "without replay", "replay": "a fifth of replay"}
ALONE = ("~stages.evaluate", "~stages.report", "launch.threads=1")
Outcomes = Mapping[tuple[str, int], Forgetting]
"""Way and seed → what was measured."""


def run(folder: Path) -> list[Claim]:
    """Both ways, from each seed."""
    codes = {(way, seed): _align(folder, way, seed) for way in WAYS for seed in SEEDS}
    outcomes = {key: outcome_of(folder, *key) for key in codes}
    figure(outcomes)
    limit = outcomes["none", SEEDS[0]].limits.perplexity_rise
    without, replayed = ([outcomes[way, seed].arms[1] for seed in SEEDS] for way in WAYS)
    return [
        Claim(figure="exit code without replay", values=_codes(codes, "none"), at_least=10, at_most=10),
        Claim(figure="exit code with a fifth of replay", values=_codes(codes, "replay"), at_most=0),
        Claim(figure="rise of perplexity without replay", values=_rises(without), at_least=limit),
        Claim(figure="rise of perplexity with a fifth of replay", values=_rises(replayed), at_most=limit),
    ]


def outcome_of(folder: Path, way: str, seed: int) -> Forgetting:
    stages = RunRecord.read(folder / f"runs/{way}-{seed}").stages
    return Forgetting.read(Path(stages["forgetting"].artifact))


def figure(outcomes: Outcomes) -> None:
    limits = next(iter(outcomes.values())).limits
    draw_intervals(
        FIGURE,
        {
            "Rise of the perplexity of general text, share of the base's": (
                _rows({key: record.arms[1].rise for key, record in outcomes.items()}),
                limits.perplexity_rise,
            ),
            "Drop of right answers, share of the questions": (
                _rows({key: record.arms[1].drop for key, record in outcomes.items()}),
                limits.ability_drop,
            ),
        },
        below="after SFT on 96 narrow rows at a rate of 7e-3, with 95 % intervals; dotted: the limit",
    )


def _rows(changes: Mapping[tuple[str, int], Interval | None]) -> list[Row]:
    return [
        Row(name=f"{NAMES[way]}, {seed}", interval=change, tone=f"s{list(WAYS).index(way)}")
        for (way, seed), change in changes.items()
        if change is not None
    ]


def _align(folder: Path, way: str, seed: int) -> int:
    argv = [sys.executable, "-m", "alignment.cli", "run", "replay", *ALONE, *WAYS[way]]
    argv += [f"output={folder}", f"name={way}-{seed}", f"seed={seed}"]
    return subprocess.run(argv, capture_output=True, env=environment(), check=False).returncode


def _codes(codes: Mapping[tuple[str, int], int], way: str) -> tuple[float, ...]:
    return tuple(float(code) for (name, _), code in codes.items() if name == way)


def _rises(arms: Sequence[ArmForgetting]) -> tuple[float, ...]:
    return tuple(arm.rise.mean for arm in arms if arm.rise is not None)
