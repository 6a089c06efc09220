"""``python -m tests.matrix``: tries every stage under every adapter and launcher, and writes docs/compatibility.*.

The files are written after each launcher and adapter, and each of their cells names the run that it came from. A cell
that was not asked for stays as it is. Exit code: 0 every cell works or is refused with a reason, 1 one failed, 2 a
wrong option.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import results_file
from tests.matrix.cells import ADAPTERS, LAUNCHERS, LOGITS, MODELS, SAME, STAGES, Bench, Cell, Outcome
from tests.matrix.rows import write_rows
from tests.tiny import save_tiny_model

DOCS = Path(__file__).parents[2] / "docs"
_AXES = {"stage": STAGES, "adapter": ADAPTERS, "launcher": LAUNCHERS, "dtype": tuple(MODELS)}


def main(argv: Sequence[str] | None = None) -> int:
    """Tries what was asked for; see the module for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    for axis, names in _AXES.items():
        parser.add_argument(f"--{axis}", help=f"comma-separated: {', '.join(names)}")
    options = parser.parse_args(argv)
    chosen = {axis: (getattr(options, axis) or ",".join(names)).split(",") for axis, names in _AXES.items()}
    for axis, names in chosen.items():
        if unknown := [name for name in names if name not in _AXES[axis]]:
            parser.error(f"no {axis} {', '.join(unknown)}; there are {', '.join(_AXES[axis])}")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = _tried(Path(folder), chosen)
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    print(f"{len(outcomes)} cells, {failed} failed")
    return int(failed > 0)


def _tried(folder: Path, chosen: dict[str, list[str]]) -> list[Outcome]:
    write_rows(folder)
    for dtype, architecture in MODELS.items():
        save_tiny_model(folder / dtype / "model", architecture=architecture)
    bench = Bench(folder=folder)
    known: dict[Cell, Outcome] = {}
    outcomes = []
    for dtype, launcher, adapter in itertools.product(chosen["dtype"], chosen["launcher"], chosen["adapter"]):
        cells = [Cell(stage=stage, adapter=adapter, launcher=launcher, dtype=dtype) for stage in chosen["stage"]]
        for cell in itertools.chain.from_iterable(map(_needed, cells)):
            if cell not in known:
                started = time.monotonic()
                known[cell] = bench.outcome(cell)
                _show(known[cell], time.monotonic() - started)
        tried = [known[cell] for cell in cells]
        _write(tried)
        outcomes += tried
    return outcomes


def _write(outcomes: Sequence[Outcome]) -> None:
    content = results_file.update(DOCS / "compatibility.json", "cells", list(map(_entry, outcomes)), names=_AXES)
    if content is not None:
        (DOCS / "compatibility.md").write_text(page(content), encoding="utf-8")


def _needed(cell: Cell) -> list[Cell]:
    """The cells that this one is compared with or takes its reward model from, and itself, last."""
    alone = replace(cell, launcher="local")
    reward = [replace(alone, stage="reward")] if cell.kind == "ppo" else []
    return [*reward, alone, cell]


def _show(outcome: Outcome, seconds: float) -> None:
    cell = outcome.cell
    figures = ", ".join(f"{name} {value:.1g}" for name, value in outcome.figures.items())
    detail = outcome.reason or figures
    where = f"{cell.dtype:<8} {cell.launcher:<6} {cell.adapter:<7} {cell.stage:<7}"
    print(f"{where} {outcome.state:<8} {seconds:4.0f} s  {detail}", flush=True)


def _entry(outcome: Outcome) -> dict[str, Any]:
    cell = outcome.cell
    return {
        "stage": cell.stage,
        "adapter": cell.adapter,
        "launcher": cell.launcher,
        "dtype": cell.dtype,
        "state": outcome.state,
        **({"reason": outcome.reason} if outcome.reason else {}),
        **{name: float(f"{value:.2g}") for name, value in outcome.figures.items()},
    }


def page(content: dict[str, Any]) -> str:
    """The tables for readers: a row for each adapter and stage, reasons below."""
    cells = {(cell["dtype"], cell["adapter"], cell["stage"], cell["launcher"]): cell for cell in content["cells"]}
    runs = content["runs"]
    several = len(runs) > 1
    reasons: list[str] = []
    lines = [
        "# Which stages, adapters and launches work together",
        "",
        "`make matrix` writes this page. It runs each stage with 2 processes (1 for `local`), with default settings "
        "except for sizes: on a tiny Llama in float32, and on a tiny Qwen2, whose attention has biases, in bfloat16. "
        "Row lengths vary a lot, so that processes split their shares of a batch into different numbers of "
        "micro-batches. The results come from:",
        "",
        *(f"- {_letter(number) if several else ''}{_described(run)}" for number, run in enumerate(runs)),
        "",
        "- *works*: with the same global batch, the metrics of every step equal those of one process within "
        f"{SAME['float32']:g}. Plain transformers and PEFT read the result and give the same logits within "
        f"{LOGITS['float32']:g}. No weight is empty. In bfloat16 the metrics of the first step are compared, within "
        f"{SAME['bfloat16']:g} (of PPO those that do not depend on the answers), and the logits within "
        f"{LOGITS['bfloat16']:g}.",
        "- *refused*: the combination does not work, and is refused before anything starts, for the reason below.",
        "- *not tried*: this combination has not been run.",
        "",
        "`grpo` is the kind `ppo` with `advantage=grpo`, `critic=none` and the KL divergence in the loss. `draft` and "
        "`distil` are both the kind `distil` with the first layer as the student; `distil` here has "
        "`method=sequence`. Kinds of stage that train nothing are left out. A "
        "row without a result is left out, too.",
    ]
    tried = {key[:3] for key in cells}
    for dtype, adapter, stage in itertools.product(MODELS, ADAPTERS, STAGES):
        if (adapter, stage) == (ADAPTERS[0], STAGES[0]):
            lines += ["", f"## {dtype}, {MODELS[dtype]}", "", "| adapter | stage | " + " | ".join(LAUNCHERS) + " |"]
            lines += ["|---|---|" + "---|" * len(LAUNCHERS)]
        if (dtype, adapter, stage) not in tried:
            continue
        row = []
        for launcher in LAUNCHERS:
            cell = cells.get((dtype, adapter, stage, launcher))
            if cell is None:  # a new stage, of which so far only a part was tried
                row.append("not tried")
                continue
            state, reason = cell["state"], cell.get("reason", "")
            if state == "refused":
                reasons += [] if reason in reasons else [reason]
                state = f"refused ({reasons.index(reason) + 1})"
            row.append(state + (f" {_letter(cell['run'])}" if several else "").rstrip(": "))
        lines.append(f"| {adapter} | {stage} | " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def _letter(number: int) -> str:
    return f"{chr(ord('a') + number)}: "


def _described(run: dict[str, Any]) -> str:
    return f"{run['date']}, commit {run['commit'][:7]}, {run['device']}"


if __name__ == "__main__":
    sys.exit(main())
