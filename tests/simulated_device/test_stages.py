"""Every kind of stage runs on the device, waits no more often than its budget allows, and decodes with few kernels. A
new read of a value in a step, such as ``.item()``, or a new call in a layer goes red. Counts depend on tiny models and
their rows only where a line is called for each micro-batch. The adapters that ``usual_cells`` leaves out are tried by
on_card.py, also on the simulated device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from alignment.stages.registry import _BUILT_IN
from tests.simulated_device.client import Device, Outcome, listing, waits
from tests.simulated_device.conftest import Stages
from tests.simulated_device.events import Event
from tests.simulated_device.stages import KINDS, Cell, usual_cells

pytestmark = pytest.mark.xdist_group("simulated device")
WITHOUT = {"report", "benchmark"}
"""Kinds without a cell: one never loads torch, the other reads a model through lm-evaluation-harness."""


@pytest.mark.parametrize("cell", usual_cells(), ids=str)
def test_a_stage_runs_on_the_device(stages: Stages, cell: Cell) -> None:
    outcome = stages.outcome(cell)
    assert outcome.error == ""
    assert outcome.faults == []
    assert outcome.events, "the stage has used the device"


def test_a_card_is_tried_by_a_command(device: Device) -> None:
    outcome = device.execute("from tests.simulated_device.on_card import main\nresult = main(['--only', 'sft-lora-f'])")
    assert (outcome.error, outcome.result) == ("", 0)


def test_every_kind_has_a_cell() -> None:
    assert set(KINDS) | WITHOUT == set(_BUILT_IN)


def test_tensors_of_two_devices_do_not_mix(two_devices: Device) -> None:
    code = """
first, second = (torch.ones(2, device=f"cuda:{index}") for index in range(2))
result = [str((second * 2).device), str(second.to("cuda:0").device), float((first + second.to("cuda:0")).sum())]
first + second
"""
    outcome = two_devices.execute(code)
    assert "two devices, cuda:0 and cuda:1" in outcome.error
    assert outcome.result == ["cuda:1", "cuda:0", 4.0]


def test_each_process_trains_on_its_own_device(two_devices: Device) -> None:
    outcome = two_devices.run(Cell(stage="ppo"), processes=2)
    assert outcome.error == ""
    assert outcome.faults == []


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Waits of a step: those that our lines ask for, and those of TRL, transformers, accelerate and PEFT.

    ``collected`` are our waits of an update's sampling and scoring in PPO, without those of decoding. With None the
    steps have different numbers of micro-batches, so only the cheapest is looked at.
    """

    own: int
    libraries: int
    collected: int | None = 0


BUDGETS = {
    "cpt": Budget(own=1, libraries=8),
    "sft": Budget(own=1, libraries=7),
    "reward": Budget(own=1, libraries=14),
    "dpo": Budget(own=1, libraries=36),
    "dpo_precomputed": Budget(own=1, libraries=36),
    "kto": Budget(own=1, libraries=20),
    "distil": Budget(own=1, libraries=7, collected=None),
    "distil_tokens": Budget(own=2, libraries=2, collected=None),
    "ppo": Budget(own=1, libraries=0, collected=3),
    "ppo_shared": Budget(own=1, libraries=0, collected=3),
    "ppo_guarded": Budget(own=2, libraries=0, collected=4),
    "grpo": Budget(own=1, libraries=0, collected=3),
}
_GENERATE = "alignment/models/forward/generate.py"


def _is_of_decoding(event: Event) -> bool:
    return bool(event.lines) and event.lines[0].startswith(_GENERATE)


def _split(outcome: Outcome) -> tuple[Counter[Event], Counter[Event]]:
    without = [Counter({event: n for event, n in step.items() if not _is_of_decoding(event)}) for step in outcome.steps]
    cheapest = min(without, key=lambda step: (waits(step, own=True), waits(step, own=False)))
    return cheapest, max(without, key=lambda step: waits(step, own=True)) - cheapest


@pytest.mark.parametrize("stage", sorted(BUDGETS))
def test_a_step_waits_no_more_often_than_its_budget_allows(stages: Stages, stage: str) -> None:
    outcome, budget = stages.outcome(Cell(stage=stage)), BUDGETS[stage]
    assert outcome.error == ""
    step, collected = _split(outcome)
    assert waits(step, own=True) == budget.own, listing(step)
    assert waits(step, own=False) <= budget.libraries, listing(step)
    if budget.collected is not None:
        assert waits(collected, own=True) == budget.collected, listing(collected)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "sample", "evaluate"])
def test_decoding_waits_once_for_a_token(stages: Stages, stage: str) -> None:
    """Of a batch, whatever the number of rows."""
    outcome = stages.outcome(Cell(stage=stage))
    decoding = Counter({event: count for event, count in outcome.events.items() if _is_of_decoding(event)})
    assert outcome.decoded > 0
    assert waits(decoding, own=True) == outcome.decoded, listing(decoding)


@pytest.mark.parametrize("cell", [cell for cell in usual_cells() if cell.adapter != "lora"], ids=str)
def test_no_adapter_costs_a_wait(stages: Stages, cell: Cell) -> None:
    plain, other = (_split(stages.outcome(each)) for each in (Cell(stage=cell.stage), cell))
    assert [waits(part, own=True) for part in other] == [waits(part, own=True) for part in plain], listing(other[0])


LAUNCHES = {"has_adapter=True": (23, 35), "has_adapter=True, copies=False": (30, 35), "has_adapter=False": (19, 35)}
"""For each token of a batch in each layer, and beside the layers, where weights may be copied or not."""


@pytest.mark.parametrize("policy", sorted(LAUNCHES))
def test_a_token_launches_as_many_kernels_as_its_budget_says(device: Device, policy: str) -> None:
    outcome = device.execute(
        f"from tests.simulated_device.decoding import launches_of_a_token\nresult = launches_of_a_token({policy})"
    )
    assert outcome.error == ""
    assert tuple(outcome.result) == LAUNCHES[policy]


@pytest.mark.parametrize("has_adapter", [True, False])
def test_a_device_decodes_what_the_host_decodes(device: Device, has_adapter: bool) -> None:
    """Prompts of unlike lengths, so that masks count; layers of one input are one product on the device."""
    outcome = device.execute(
        "from tests.simulated_device.decoding import greedy_answers\n"
        f"result = [greedy_answers(device, has_adapter={has_adapter}) for device in ('cpu', 'cuda')]"
    )
    assert outcome.error == ""
    on_host, on_device = outcome.result
    assert on_device == on_host
    assert len({tuple(answer) for answer in on_host}) == 3
