"""``python -m tests.matrix``: tries every stage under every adapter and launcher, and writes docs/compatibility.*.

The files hold whole tables only. Exit code: 0 every cell works or is refused with a reason, 1 one failed, 2 a wrong
option.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from alignment.core.artifacts import write_json
from alignment.core.versions import PACKAGES
from alignment.pipeline.execute.worker_protocol import commit_of_checkout
from benchmarks.machine import processor
from tests.matrix.cells import ADAPTERS, LAUNCHERS, LOGITS, SAME, STAGES, Bench, Cell, Outcome
from tests.matrix.rows import write_rows
from tests.tiny import save_tiny_model

DOCS = Path(__file__).parents[2] / "docs"
_AXES = {"stage": STAGES, "adapter": ADAPTERS, "launcher": LAUNCHERS}


def main(argv: Sequence[str] | None = None) -> int:
    """Tries what was asked for; see the module for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    for axis, names in _AXES.items():
        parser.add_argument(f"--{axis}", help=f"comma-separated: {', '.join(names)}; leaves docs/compatibility.* alone")
    options = parser.parse_args(argv)
    chosen = {axis: (getattr(options, axis) or ",".join(names)).split(",") for axis, names in _AXES.items()}
    for axis, names in chosen.items():
        if unknown := [name for name in names if name not in _AXES[axis]]:
            parser.error(f"no {axis} {', '.join(unknown)}; there are {', '.join(_AXES[axis])}")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = _tried(Path(folder), chosen)
    if all(set(chosen[axis]) == set(names) for axis, names in _AXES.items()):
        record = _record(outcomes)
        write_json(DOCS / "compatibility.json", record)
        (DOCS / "compatibility.md").write_text(_page(outcomes, record), encoding="utf-8")
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    print(f"{len(outcomes)} cells, {failed} failed")
    return int(failed > 0)


def _tried(folder: Path, chosen: dict[str, list[str]]) -> list[Outcome]:
    write_rows(folder)
    bench = Bench(folder=folder, model=save_tiny_model(folder / "model"))
    known: dict[Cell, Outcome] = {}
    for launcher, adapter, stage in itertools.product(chosen["launcher"], chosen["adapter"], chosen["stage"]):
        for cell in _needed(Cell(stage=stage, adapter=adapter, launcher=launcher)):
            if cell not in known:
                started = time.monotonic()
                known[cell] = bench.outcome(cell)
                _show(known[cell], time.monotonic() - started)
    return [one for cell, one in known.items() if all(getattr(cell, axis) in names for axis, names in chosen.items())]


def _needed(cell: Cell) -> list[Cell]:
    """The cells that this one is compared with or takes its reward model from, and itself, last."""
    alone = Cell(stage=cell.stage, adapter=cell.adapter, launcher="local")
    reward = [Cell(stage="reward", adapter=cell.adapter, launcher="local")] if cell.stage == "ppo" else []
    return [*reward, alone, cell]


def _show(outcome: Outcome, seconds: float) -> None:
    cell = outcome.cell
    figures = ", ".join(f"{name} {value:.1g}" for name, value in outcome.figures.items())
    told = outcome.reason or figures
    print(
        f"{cell.launcher:<6} {cell.adapter:<7} {cell.stage:<7} {outcome.state:<8} {seconds:4.0f} s  {told}", flush=True
    )


def _record(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    machine = processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of_checkout(DOCS.parent),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {machine['model']}",
        "processes": 2,
        "versions": {
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in (*PACKAGES, "deepspeed") if name in _installed()},
        },
        "bounds": {"figures": SAME, "logits": LOGITS},
        "cells": [
            {
                "stage": outcome.cell.stage,
                "adapter": outcome.cell.adapter,
                "launcher": outcome.cell.launcher,
                "state": outcome.state,
                **({"reason": outcome.reason} if outcome.reason else {}),
                **{name: float(f"{value:.2g}") for name, value in outcome.figures.items()},
            }
            for outcome in outcomes
        ],
    }


def _installed() -> set[str]:
    return {distribution.name for distribution in importlib.metadata.distributions()}


def _page(outcomes: Sequence[Outcome], record: dict[str, Any]) -> str:
    """The table for readers: a row for each adapter and stage, reasons below."""
    state = {(o.cell.adapter, o.cell.stage, o.cell.launcher): o for o in outcomes}
    reasons: list[str] = []
    lines = [
        "# Which stages, adapters and launches work together",
        "",
        f"Written by `make matrix` on {record['date']} at {record['commit'][:7]}: {record['device']}, "
        f"{record['processes']} processes (1 for `local`), "
        "a tiny Llama in float32, each stage with its default settings except for sizes. Row lengths differ strongly, "
        "so that processes split their shares of a batch into different numbers of micro-batches.",
        "",
        "*works*: the metrics of every step equal those of one process within "
        f"{SAME:g} (same global batch). Plain transformers and PEFT read the result and give the same logits within "
        f"{LOGITS:g}. No weight is empty. A combination that does not work is refused before anything starts; "
        "the reasons are below.",
        "",
        "| adapter | stage | " + " | ".join(LAUNCHERS) + " |",
        "|---|---|" + "---|" * len(LAUNCHERS),
    ]
    for adapter, stage in itertools.product(ADAPTERS, STAGES):
        cells = []
        for launcher in LAUNCHERS:
            outcome = state[adapter, stage, launcher]
            if outcome.state == "refused" and outcome.reason not in reasons:
                reasons.append(outcome.reason)
            cells.append(
                f"refused ({reasons.index(outcome.reason) + 1})" if outcome.state == "refused" else outcome.state
            )
        lines.append(f"| {adapter} | {stage} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
