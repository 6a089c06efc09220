"""Planned beside measured: every kind of training under every adapter, planned on shapes and then run.

``python -m benchmarks.planned_costs`` takes the shipped model of 135 million weights, and rows of about equal length,
so that a micro-batch of the run is as large as the largest one that is planned. It writes docs/costs.json and the table
between two comments of docs/costs.md. ``--only full,lora`` chooses adapters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignment.core.artifacts import read_manifest
from alignment.core.files import CODE_ROOT
from alignment.costs.devices import THIS
from alignment.pipeline.execute import estimates
from alignment.pipeline.plan.plan import make_plan
from alignment.records.cost import StageCost

ADAPTERS = ("full", "lora", "dora", "qlora", "prefix")
RESULTS, PAGE = CODE_ROOT / "docs" / "costs.json", CODE_ROOT / "docs" / "costs.md"
BEGIN, END = "<!-- planned beside measured -->", "<!-- end -->"
WRITTEN = "`python -m benchmarks.planned_costs` wrote this table:"
PEAK = "peak_rss_bytes/"
_WORDS = ("the", "note", "says", "that", "keys", "are", "with", "caretaker", "in", "hall")
_OPTIM = "optim: {batch_size: 4, micro_batch_tokens: 1024, lr: 1e-4, warmup_ratio: 0.0, max_steps: 3}"
_RL = "optim: {batch_size: 8, micro_batch_tokens: 1024, lr: 1e-4}"
_ROLLOUTS = "max_new_tokens: 64, updates: 2, completions_per_prompt: 2, ppo_epochs: 1, num_minibatches: 1"
_STAGES = {
    "cpt": f'init: base, data: {{source: "path:texts.jsonl"}}, max_length: 256, {_OPTIM}',
    "sft": f'init: base, data: {{source: "path:conversations.jsonl"}}, {_OPTIM}',
    "reward": f'init: base, data: {{source: "path:pairs.jsonl"}}, eval_fraction: 0.25, {_OPTIM}',
    "dpo": f'init: base, data: {{source: "path:pairs.jsonl"}}, {_OPTIM}',
    "kto": f'init: base, data: {{source: "path:pairs.jsonl"}}, {_OPTIM}',
    "ppo": f'init: base, reward: "stage:reward", data: {{source: "path:pairs.jsonl"}}, {_ROLLOUTS}, {_RL}',
    "grpo": f'init: base, reward: "stage:reward", advantage: grpo, critic: none, data: {{source: "path:pairs.jsonl"}}, '
    f"{_ROLLOUTS}, {_RL}",
}
_KINDS = {"grpo": "ppo"}
"""The kind of a stage that has another name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Bytes and seconds of one stage, planned and measured; ``phases`` has the bytes of each phase."""

    stage: str
    adapter: str
    planned: int
    measured: int
    planned_seconds: float
    seconds: float
    phases: dict[str, tuple[int, int]]

    @property
    def error(self) -> float:
        """How far the planned memory is from the measured one, as a share of that."""
        return self.planned / self.measured - 1


def main() -> int:
    """Plans, runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(ADAPTERS))
    parser.add_argument("--folder", type=Path, help="keep the runs here, and reuse those that are there")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    cells = []
    for adapter in options.only.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)) / adapter
            folder.mkdir(parents=True, exist_ok=True)
            for cell in _cells(adapter, folder, options.overrides):
                cells.append(cell)
                print(_line(cell), flush=True)
    if options.only == ",".join(ADAPTERS):
        RESULTS.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
        _write_page(cells)
    return 0


def _cells(adapter: str, folder: Path, more: Sequence[str]) -> Iterator[Cell]:
    _write_rows(folder)
    recipe = folder / "costs.yaml"
    recipe.write_text(_recipe().replace("path:", f"path:{folder}/"), encoding="utf-8")
    overrides = [f"output={folder / 'out'}", *(f"adapter@stages.{name}.adapter={adapter}" for name in _STAGES), *more]
    plan = make_plan(str(recipe), overrides)
    planned = estimates.estimate(plan, device=THIS, memory=0.0, as_run=True, announce=print)
    subprocess.run([sys.executable, "-m", "alignment.cli", "run", str(recipe), *overrides], check=True)
    for stage, cost in zip(plan.stages, planned.stages, strict=True):
        manifest = read_manifest(stage.artifact)
        assert manifest is not None, "the run has made it"
        yield _cell(cost, adapter, manifest.usage)


def _recipe() -> str:
    kinds = "\n".join(f"  - stage@stages.{name}: {_KINDS.get(name, name)}" for name in _STAGES)
    settings = "\n".join(f"  {name}: {{{values}}}" for name, values in _STAGES.items())
    return f"""
defaults:
  - base
{kinds}
  - _self_
summary: every kind of training, to compare what was planned with what was measured
stages:
{settings}
"""


def _cell(cost: StageCost, adapter: str, usage: dict[str, float]) -> Cell:
    if cost.error:
        raise RuntimeError(f"{cost.stage}: {cost.error}")
    phases = {
        name: (cost.fixed + phase.held, int(usage[f"{PEAK}{name}"]))
        for name, phase in cost.phases.items()
        if f"{PEAK}{name}" in usage
    }
    return Cell(
        stage=cost.stage,
        adapter=adapter,
        planned=max(planned for planned, _ in phases.values()),
        measured=int(usage["peak_rss_bytes"]),
        planned_seconds=cost.seconds,
        seconds=usage["seconds"],
        phases=phases,
    )


def _write_rows(folder: Path) -> None:
    rows: dict[str, list[dict[str, Any]]]
    question, answer = _words(150), _words(60)
    turns = [{"role": "user", "content": question}]
    rows = {
        "texts": [{"text": _words(900)} for _ in range(16)],
        "conversations": [{"messages": [*turns, {"role": "assistant", "content": answer}]} for _ in range(16)],
        "pairs": [
            {"prompt": [{"role": "user", "content": f"{row} {question}"}], "chosen": answer, "rejected": f"no {answer}"}
            for row in range(16)
        ],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _words(number: int) -> str:
    return " ".join(_WORDS[index % len(_WORDS)] for index in range(number))


def _line(cell: Cell) -> str:
    phases = ", ".join(
        f"{name} {planned / 1e9:.2f}/{measured / 1e9:.2f}" for name, (planned, measured) in cell.phases.items()
    )
    return (
        f"| {cell.stage} | {cell.adapter} | {cell.planned / 1e9:.2f} | {cell.measured / 1e9:.2f} | {cell.error:+.0%} | "
        f"{cell.planned_seconds:.0f} | {cell.seconds:.0f} | {phases} |"
    )


def _write_page(cells: Sequence[Cell]) -> None:
    columns = ["stage", "adapter", "planned, GB", "measured, GB", "error", "planned, s", "measured, s", "phases, GB"]
    head = f"| {' | '.join(columns)} |"
    table = "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(_line, cells)])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{WRITTEN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
