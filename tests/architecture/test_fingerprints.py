"""The fingerprint of every stage of every recipe is what it was before the package was rearranged (docs/design/0021).

``fingerprints.json`` was made by the code of commit 9a6ff3e. Delete both once results of that time are no longer kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.pipeline.plan.plan import Plan, make_plan

TABLE: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("fingerprints.json").read_text(encoding="utf-8"))
NEW_IDENTITY = {
    "evaluate": "its metrics are the recipe's, and evaluation.json has another form",
    "reward_card": "its rule is a function of a file, hashed as code",
}
"""Kinds of stages whose fingerprints differ from the table's, with the reason; stages that build on them differ too."""

OLDER_SETTINGS = {"replay": ["stages.sft.optim.lr=6.5e-3"]}
"""Settings of recipes as they were when the table was made."""


@pytest.mark.parametrize("call", TABLE)
def test_a_stage_has_the_fingerprint_that_it_had(call: str, tmp_path: Path) -> None:
    recipe, *overrides = call.split()
    plan = make_plan(recipe, [*OLDER_SETTINGS.get(recipe, []), *overrides, f"output={tmp_path}"])
    same = {stage.name: stage.fingerprint == TABLE[call][stage.name] for stage in plan.stages}
    assert list(same) == list(TABLE[call])
    assert same == {stage.name: stage.name not in _new(plan) for stage in plan.stages}


def _new(plan: Plan) -> set[str]:
    """The stages of a kind that has a new identity, and those whose identity holds the fingerprint of one."""
    new: dict[str, str] = {}
    for stage in plan.stages:
        if stage.config.kind in NEW_IDENTITY or set(stage.identity["inputs"].values()) & set(new.values()):
            new[stage.name] = stage.fingerprint
    return set(new)
