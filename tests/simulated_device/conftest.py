"""One process with the device for all tests of this folder; they are skipped where a device cannot be simulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulated_device.build import missing
from tests.simulated_device.client import Device, Outcome
from tests.simulated_device.stages import Cell


class Stages:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._outcomes: dict[Cell, Outcome] = {}

    def outcome(self, cell: Cell) -> Outcome:
        if cell not in self._outcomes:
            self._outcomes[cell] = self._device.run(cell)
        return self._outcomes[cell]


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    if lacking := missing():
        pytest.skip(lacking)
    device = Device()
    yield device
    device.close()


@pytest.fixture(scope="session")
def stages(device: Device) -> Stages:
    return Stages(device)


@pytest.fixture(scope="session")
def two_devices() -> Iterator[Device]:
    if lacking := missing():
        pytest.skip(lacking)
    device = Device(devices=2)
    yield device
    device.close()
