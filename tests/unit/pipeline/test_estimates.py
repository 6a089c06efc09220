"""What the process that estimates may try for a stage that does not fit: only what a plan allows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from alignment.core import hardware
from alignment.core.locks import held
from alignment.costs.devices import THIS
from alignment.costs.remedies import Way
from alignment.pipeline.execute import estimates, planned_costs
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.records.cost import FILE, PROGRESS, PhaseCost, RunCost, StageCost
from alignment.stages.stage_file import read_spec
from tests.unit.pipeline.conftest import MakePlan

FULL = "adapter@stages.dpo.adapter=full"
BOTH = ["optim.micro_batch_tokens", "optim.activation_checkpointing"]
ALL = [*BOTH, "precompute_reference"]
SIMPO = ("stages.dpo.loss=simpo", "stages.dpo.target_margin=1")
SHARES = ("launch=zero3", "launch.num_processes=2")


def ways_of_dpo(plan: MakePlan, folder: Path, *overrides: str) -> dict[str, Way]:
    planned = plan(*overrides)
    (stage,) = (stage for stage in planned.stages if stage.name == "dpo")
    asked = estimates._asked(planned, stage, folder, trade=False, with_remedies=True)
    ways = [Way.from_plain(way) for way in json.loads(json.dumps(asked["cheaper"]))]
    return {" ".join(way.overrides).rpartition(".")[2]: way for way in ways}


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ((), {"": BOTH, "adapter=qlora": BOTH}),
        ((FULL,), {"": ALL, "master_weights=false": ALL, "adapter=lora": BOTH, "adapter=qlora": BOTH}),
        ((FULL, *SIMPO), {"": BOTH, "master_weights=false": BOTH, "adapter=lora": BOTH, "adapter=qlora": BOTH}),
        ((FULL, *SHARES), {"": BOTH, "adapter=lora": BOTH, "adapter=qlora": BOTH}),
    ],
    ids=["lora", "full", "simpo", "zero3"],
)
def test_every_way_has_the_choices_that_a_plan_allows(
    plan: MakePlan, tmp_path: Path, overrides: tuple[str, ...], fields: dict[str, list[str]]
) -> None:
    """A loss without a reference takes none that was computed beforehand, and sharding none without masters."""
    ways = ways_of_dpo(plan, tmp_path / "stages", *overrides)
    assert {name: [choice.field for choice in way.choices] for name, way in ways.items()} == fields


def test_a_way_is_a_stage_file_whose_choices_are_still_the_users(plan: MakePlan, tmp_path: Path) -> None:
    ways = ways_of_dpo(plan, tmp_path / "stages", FULL, "stages.dpo.optim.micro_batch_tokens=4096")
    assert ways[""].choices[0].values == (2048, 1024, 512)
    for name, way in ways.items():
        config: Any = read_spec(Path(way.file)).config
        assert (config.optim.micro_batch_tokens, config.precompute_reference) == (4096, False)
        assert config.adapter.kind.value == (name.removeprefix("adapter=") if name.startswith("adapter") else "full")
        assert config.adapter.master_weights == (name != "master_weights=false")


OWN_KIND = "stages.dpo.adapter.kind=full"


@pytest.mark.parametrize("in_recipe", [True, False])
def test_a_trade_offers_no_adapter_that_another_setting_replaces(
    overrides: list[str], tmp_path: Path, in_recipe: bool
) -> None:
    recipe = tmp_path / "own.yaml"
    body = "stages: {dpo: {adapter: {kind: full}}}\n" if in_recipe else ""
    recipe.write_text(f"defaults: [quickstart, _self_]\nname: own\n{body}")
    planned = make_plan(str(recipe), overrides if in_recipe else [*overrides, OWN_KIND])
    (stage,) = (stage for stage in planned.stages if stage.name == "dpo")
    ways = estimates._asked(planned, stage, tmp_path / "stages", trade=True, with_remedies=False)["ways"]
    assert [way["name"] for way in ways] == ["full", "full without masters", "lora", "dora", "qlora", "prefix"]
    assert [way["name"] for way in ways if way["file"] is not None] == ["full", "full without masters"]


def remembered(planned: Plan, costs: Mapping[str, StageCost], *, memory: float) -> None:
    """Leaves what an earlier call estimated of some stages with this much memory."""
    for stage in planned.stages:
        if stage.name in costs:
            file = estimates._file(planned, stage, THIS)
            file.parent.mkdir(parents=True, exist_ok=True)
            RunCost(device=THIS, memory=memory, startup=4.0, stages=[costs[stage.name]]).write(file)


def test_a_stage_with_other_settings_than_those_that_were_estimated_is_not_left_out(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: 8e9)
    names = ("sft", "reward", "dpo", "ppo", "evaluate")
    phases = {"training": PhaseCost(peak=10**9, seconds=5.0)}
    costs = {name: StageCost(stage=name, kind=name, phases=phases) for name in names}
    assert planned_costs.known(plan()) is None
    remembered(plan(), costs, memory=8e9)
    cost = planned_costs.known(plan())
    assert cost is not None
    assert (cost.stages, cost.memory, cost.startup) == (list(costs.values()), 8e9, 4.0)
    other = planned_costs.known(plan("stages.dpo.beta=0.7"))
    assert other is not None
    assert {stage.stage: stage.error for stage in other.stages if stage.error} == dict.fromkeys(
        ("dpo", "evaluate"), "its settings are new since the last estimate; estimate again"
    )
    assert [stage.stage for stage in other.stages] == list(names)


@pytest.mark.parametrize(("free", "fits"), [(4e9, True), (2e9, False)])
def test_a_remedy_is_offered_again_where_it_still_fits(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, free: float, fits: bool
) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    phases = {"training": PhaseCost(peak=10**10)}
    settings = ["stages.sft.optim.micro_batch_tokens=512"]
    sft = StageCost(stage="sft", kind="sft", phases=phases, remedy=settings, remedy_peak=3 * 10**9)
    remembered(plan(), {"sft": sft}, memory=5e9)
    cost = planned_costs.known(plan())
    assert cost is not None
    assert (cost.stages[0].remedy, cost.stages[0].remedy_peak) == ((settings, 3 * 10**9) if fits else ([], 0))


def test_what_the_process_says_just_before_it_ends_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before it is looked at for the first time."""
    RunCost(device="this", memory=0.0, stages=[]).write(tmp_path / FILE)
    program = tmp_path / "program"
    program.write_text(
        f"#!/bin/sh\necho 'sft: as it is' >> \"$3/{PROGRESS}\"\necho 'sft: with lora' >> \"$3/{PROGRESS}\"\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(estimates.sys, "executable", str(program))
    announcements: list[str] = []
    assert estimates._in_process(tmp_path, [], announce=announcements.append).stages == []
    assert announcements == ["sft: as it is", "sft: with lora"]


def test_of_earlier_calls_only_those_that_were_killed_are_cleared(tmp_path: Path) -> None:
    """The other may be of another machine or container, where the same ids are other processes."""
    killed, living = tmp_path / "12-0a1b2c3d", tmp_path / f"{os.getpid()}-4e5f6a7b"
    for folder in (killed, living):
        folder.mkdir()
        (folder / "lock").touch()
    with held(living / "lock", wait=False):
        estimates._clear(tmp_path)
        assert list(tmp_path.iterdir()) == [living]
