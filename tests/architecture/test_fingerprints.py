"""The fingerprint of every stage of every recipe is what it was: a change makes users' results anew. ``python -m
tests.architecture.test_fingerprints`` writes the table, after a change that was meant."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from alignment.pipeline.plan.plan import make_plan

FILE = Path(__file__).with_name("fingerprints.json")
TABLE: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))


def fingerprints(call: str, output: Path) -> dict[str, str]:
    recipe, *overrides = call.split()
    plan = make_plan(recipe, [*overrides, f"output={output}"])
    return {stage.name: stage.fingerprint for stage in plan.stages}


@pytest.mark.parametrize("call", TABLE)
def test_a_stage_has_the_fingerprint_that_it_had(call: str, tmp_path: Path) -> None:
    assert fingerprints(call, tmp_path) == TABLE[call]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table = {call: fingerprints(call, Path(folder)) for call in TABLE}
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
