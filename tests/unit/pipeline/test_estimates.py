"""What is tried where a stage does not fit, what a trade compares, and which estimates are remembered."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.config.optim import Automatic, OptimConfig
from alignment.core import hardware
from alignment.core.files import shipped
from alignment.costs.devices import THIS
from alignment.costs.remedies import Choice, Way
from alignment.pipeline.execute import estimates
from alignment.pipeline.execute.estimates import WAYS, choices, way_of_training, ways_with_less
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.records.cost import FILE, PROGRESS, PhaseCost, RunCost, StageCost
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.unit.pipeline.conftest import MakePlan, stage_of, write

FULL = "adapter@stages.dpo.adapter=full"
BOTH = ["optim.micro_batch_tokens", "optim.activation_checkpointing"]
ALL = [*BOTH, "precompute_reference"]
SIMPO = ("stages.dpo.loss=simpo", "stages.dpo.target_margin=1")
SHARES = ("launch=zero3", "launch.num_processes=2")


def ways_of_dpo(plan: MakePlan, folder: Path, *overrides: str) -> dict[str, Way]:
    planned = plan(*overrides)
    asked = estimates._asked(planned, stage_of(planned, "dpo"), folder, trade=False, with_remedies=True)
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


@pytest.mark.parametrize("in_recipe", [True, False])
def test_a_trade_offers_no_adapter_that_is_replaced(overrides: list[str], tmp_path: Path, in_recipe: bool) -> None:
    body = "stages: {dpo: {adapter: {kind: full}}}\n" if in_recipe else ""
    recipe = write(tmp_path / "own.yaml", f"defaults: [quickstart, _self_]\nname: own\n{body}")
    planned = make_plan(recipe, overrides if in_recipe else [*overrides, "stages.dpo.adapter.kind=full"])
    ways = estimates._asked(planned, stage_of(planned, "dpo"), tmp_path / "stages", trade=True, with_remedies=False)[
        "ways"
    ]
    assert [way["name"] for way in ways] == ["full", "full without masters", "lora", "dora", "qlora", "prefix"]
    assert [way["name"] for way in ways if way["file"] is not None] == ["full", "full without masters"]


def remembered(planned: Plan, costs: Mapping[str, StageCost], *, memory: float) -> None:
    for stage in planned.stages:
        if stage.name in costs:
            file = estimates._file(planned, stage, THIS)
            file.parent.mkdir(parents=True, exist_ok=True)
            RunCost(device=THIS, memory=memory, startup=4.0, stages=[costs[stage.name]]).write(file)


def test_a_stage_that_was_not_estimated_is_not_left_out(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: 8e9)
    names = ("sft", "evaluate_sft", "reward", "dpo", "ppo", "evaluate")
    phases = {"training": PhaseCost(peak=10**9, seconds=5.0)}
    costs = {name: StageCost(stage=name, kind=name, phases=phases) for name in names}
    costs["sft"] = replace(costs["sft"], remedy=["stages.sft.optim.micro_batch_tokens=512"], remedy_peak=3 * 10**9)
    assert estimates.known_costs(plan()) is None
    remembered(plan(), costs, memory=8e9)
    cost = estimates.known_costs(plan())
    assert cost is not None
    assert (cost.stages, cost.memory, cost.startup) == (list(costs.values()), 8e9, 4.0)
    other = estimates.known_costs(plan("stages.dpo.beta=0.7"))
    assert other is not None
    errors = {stage.stage: stage.error for stage in other.stages if stage.error}
    assert errors == dict.fromkeys(("dpo", "evaluate"), "its settings are new since the last estimate; estimate again")
    assert [stage.stage for stage in other.stages] == list(names)
    monkeypatch.setattr(hardware, "free_memory", lambda: 2e9)
    cost = estimates.known_costs(plan())
    assert cost is not None
    assert (cost.stages[0].remedy, cost.stages[0].remedy_peak) == ([], 0), "it no longer fits"


SMALLER = Choice(field="optim.micro_batch_tokens", values=(1024, 512))
AGAIN = Choice(field="optim.activation_checkpointing", values=(True,))


def sft(kind: AdapterKind, *, checkpoints: bool = False, tokens: Automatic | int = 2048, **adapter: Any) -> SftConfig:
    optim = OptimConfig(lr=1e-4, micro_batch_tokens=tokens, activation_checkpointing=checkpoints)
    return SftConfig(adapter=AdapterConfig(kind=kind, **adapter), data=DataConfig(source="path:x"), optim=optim)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (sft(AdapterKind.full), [SMALLER, AGAIN]),
        (sft(AdapterKind.full, checkpoints=True), [SMALLER]),
        (sft(AdapterKind.lora, tokens=1024), [replace(SMALLER, values=(512,)), AGAIN]),
        (DpoConfig(adapter=AdapterConfig(kind=AdapterKind.full), precompute_reference=True), [SMALLER, AGAIN]),
    ],
)
def test_what_takes_little_time_is_tried_first(config: SftConfig | DpoConfig, expected: list[Choice]) -> None:
    assert list(choices(config, divides_weights=False)) == expected


def test_other_weights_are_trained_last_and_every_way_is_a_group() -> None:
    own: tuple[str, ...] = ()
    lora, qlora = (("adapter@stages.sft.adapter=" + name,) for name in ("lora", "qlora"))
    bare = ("stages.sft.adapter.master_weights=false",)
    for config, ways in (
        (sft(AdapterKind.full), [own, bare, lora, qlora]),
        (sft(AdapterKind.full, master_weights=False), [own, lora, qlora]),
        (sft(AdapterKind.lora), [own, qlora]),
        (sft(AdapterKind.qlora), [own]),
    ):
        assert list(ways_with_less("sft", config)) == ways
    assert {way.replace(" ", "_") for way in WAYS} == {
        path.stem for path in (shipped("conf") / "adapter").glob("*.yaml")
    }
    assert way_of_training("dpo", "full without masters") == "adapter@stages.dpo.adapter=full_without_masters"


def test_what_the_process_says_just_before_it_ends_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before it is looked at for the first time."""
    RunCost(device="this", memory=0.0, stages=[]).write(tmp_path / FILE)
    lines = [f"echo 'sft: {way}' >> \"$3/{PROGRESS}\"" for way in ("as it is", "with lora")]
    program = write(tmp_path / "program", "\n".join(["#!/bin/sh", *lines, ""]))
    os.chmod(program, 0o755)
    monkeypatch.setattr(estimates.sys, "executable", program)
    announcements: list[str] = []
    assert estimates._in_process(tmp_path, [], announce=announcements.append).stages == []
    assert announcements == ["sft: as it is", "sft: with lora"]
