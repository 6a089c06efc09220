"""The fingerprint of every stage of every recipe is what it was before the package was rearranged (docs/design/0021).

``fingerprints.json`` was made by the code of commit 9a6ff3e. Delete both once results of that time are no longer kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.pipeline.plan.plan import make_plan

TABLE: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("fingerprints.json").read_text(encoding="utf-8"))
NEW_IDENTITY: dict[str, str] = {}
"""Kinds of stages whose fingerprints differ from the table's, with the reason; stages that build on them differ too."""


@pytest.mark.parametrize("call", TABLE)
def test_a_stage_has_the_fingerprint_that_it_had(call: str, tmp_path: Path) -> None:
    recipe, *overrides = call.split()
    plan = make_plan(recipe, [*overrides, f"output={tmp_path}"])
    assert {stage.name: stage.fingerprint for stage in plan.stages} == TABLE[call]
