"""The golden runs see what changed, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from alignment.stages.registry import kinds
from tests.same.__main__ import PLANS, RECIPE, ROOT, SAME, STAGES, compare, difference

IGNORES_RATE = """
_run = run


def run(config, context):
    config.optim.lr = 1e-4
    return _run(config, context)
"""
SAMPLES_COLDER = IGNORES_RATE.replace("optim.lr = 1e-4", "temperature = 0.5")
IS_RAISED = "\nimport dataclasses\n\nKIND = dataclasses.replace(KIND, revision=KIND.revision + 1)\n"


def test_every_kind_that_computes_has_a_golden_run() -> None:
    defaults = yaml.safe_load(RECIPE.read_text())["defaults"]
    chosen = [next(iter(row.values())) for row in defaults if isinstance(row, dict)]
    assert {name for name, kind in kinds().items() if kind.run} == set(chosen)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, SAME),
        ({"values": {"step 1": {"loss": 1.5}}}, "differs: step 1, loss was 1.0 and is 1.5"),
        ({"values": {}, "files": {}}, "differs: step 1, loss was 1.0 and is None; weights.safetensors"),
        ({"files": {"weights.safetensors": "b2"}}, "differs: weights.safetensors"),
        ({"refused": "no such file"}, "refused now: no such file"),
    ],
)
def test_a_difference_names_the_first_metric_and_the_files(change: dict[str, object], expected: str) -> None:
    before = {"values": {"step 1": {"loss": 1.0}}, "files": {"weights.safetensors": "a1"}}
    assert difference(before, before | change) == expected


@pytest.mark.processes
@pytest.mark.slow
def test_faults_are_seen_where_they_are_and_nowhere_else(tmp_path: Path) -> None:
    for folder in ("alignment", "conf", "data", "launch", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, fault in {"kto/run": IGNORES_RATE, "sample/run": SAMPLES_COLDER, "kto/kind": IS_RAISED}.items():
        with (tmp_path / f"alignment/stages/{file}.py").open("a") as source:
            source.write(fault)
    table = compare(ROOT, tmp_path, only=STAGES, calls=["kto", "sft_dpo"], dtypes=["float32"])
    others = {stage: row for stage, row in table.items() if list(row.values()) != [SAME]}
    assert set(others) == {"kto", "sample", PLANS}
    assert others["kto"]["float32"].startswith("differs: step 2, lr was 0.001 and is 0.0001; ")
    assert "rows.jsonl" in others["sample"]["float32"]
    assert others[PLANS][""].startswith("differs: kto (kto")
