"""A run with benchmarks, by the user's command: planned, made, shown, reused, and made again when a task changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.conftest import Align

TASKS = Path(__file__).parents[1] / "data" / "tasks"
RECIPE = """\
defaults: [base, stage@stages.sft: sft, stage@stages.benchmark: benchmark, stage@stages.report: report, _self_]
stages:
  sft:
    data: {source: "bundled:quickstart/conversations", limit: 12}
    optim: {batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}
    max_length: 4096
  benchmark: {arms: [base, "stage:sft"], tasks: [both, shout], bootstrap_samples: 100}
  report: {evaluation: null}
"""


@pytest.fixture
def align(new_forked: Callable[[], Align], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Align:
    """The command with the recipe, and a copy of the tasks beside it."""
    (tmp_path / "mine.yaml").write_text(RECIPE)
    shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("tests.e2e.conftest._small", lambda _: ["model.dtype=float32", "launch.threads=1"])
    return replace(new_forked(), recipe=str(tmp_path / "mine.yaml"))


def test_a_run_measures_shows_and_reuses_benchmarks(align: Align, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    own = f"stages.benchmark.task_folders=['{folder}']"
    assert f"benchmark runs your code: {folder}/words.py:cleaned" in align("plan", own)
    printed = align("run", own)
    assert f"benchmark runs your code: {folder}/words.py:cleaned" in printed
    assert "capitals/acc, 2-shot, 20 rows: base 0." in printed
    assert "sft against base in capitals/acc: " in printed
    run = align.output / "runs" / "mine"
    stages = json.loads((run / "run.json").read_text())["stages"]
    artifact = Path(stages["benchmark"]["artifact"])
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {"both/acc/sft", "capitals/acc/base", "shout/exact_match,first_word/sft", "rows"} <= set(manifest["metrics"])
    assert {path.name for path in artifact.iterdir()} == {"benchmark.json", "samples.jsonl", "manifest.json"}
    page = (run / "report.html").read_text()
    assert "capitals/acc" in page.split('<section id="results">')[1].split("</section>")[0]
    assert "3 reused" in align("plan", own)
    limited = align("run", "--stage", "benchmark", own, "stages.benchmark.limit=2")
    assert "benchmark: limit left out 44 of 50 rows, so its figures cannot be compared with others" in limited
    task = folder / "capitals.yaml"
    task.write_text(task.read_text().replace("num_fewshot: 2", "num_fewshot: 1"))
    assert re.search(r"benchmark +run .*task_folders\[0\] changed", align("plan", own))
