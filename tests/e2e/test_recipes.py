"""Recipes for GPUs, scaled down: a tiny model and a few of the shipped rows in place of theirs, all else as written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from alignment.artifacts import verify
from alignment.pipeline.compose import compose
from tests.e2e.conftest import Align

DATA = {"sft": "conversations", "reward": "preferences", "dpo": "preferences", "ppo": "preferences"}


@pytest.mark.parametrize("recipe", ["zephyr_7b_dpo_qlora", "llama_8b_rlhf_qlora"])
def test_a_recipe_for_gpus_runs_scaled_down(new_align: Callable[[], Align], recipe: str) -> None:
    align = replace(new_align(), recipe=recipe)
    stages = list(compose(recipe, []).tree["stages"])
    told = [f"stages.{stage}.data={{source: 'bundled:quickstart/{DATA[stage]}', split: train}}" for stage in stages]
    told += [f"stages.{stage}.max_prompt_length=4000" for stage in stages if stage == "dpo"]
    if "ppo" in stages:
        told.append("stages.ppo.guard={every: 2, prompts: 2}")
    printed = align("run", *told)
    assert {entry["state"] for entry in align.stages().values()} == {"done"}, printed
    for stage in stages:
        stood = verify(align.artifact(stage), content=True).adapters_stood
        assert all(one["nf4"] for one in stood.values())
        assert [one["merged"] for one in stood.values()] == [True, *[False] * (len(stood) - 1)]
