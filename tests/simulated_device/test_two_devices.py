"""Two processes, each with a device of its own: nothing of one is on the other's."""

from __future__ import annotations

import pytest

from tests.simulated_device.client import Device
from tests.simulated_device.stages import Cell

pytestmark = pytest.mark.xdist_group("simulated device")


def test_tensors_of_two_devices_do_not_mix(two_devices: Device) -> None:
    code = """
first, second = (torch.ones(2, device=f"cuda:{index}") for index in range(2))
result = [str((second * 2).device), str(second.to("cuda:0").device), float((first + second.to("cuda:0")).sum())]
first + second
"""
    outcome = two_devices.execute(code)
    assert "two devices, cuda:0 and cuda:1" in outcome.error
    assert outcome.result == ["cuda:1", "cuda:0", 4.0]


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_each_process_trains_on_its_own_device(two_devices: Device, stage: str) -> None:
    outcome = two_devices.run(Cell(stage=stage), processes=2)
    assert outcome.error == ""
    assert outcome.faults == []
