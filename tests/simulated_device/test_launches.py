"""How many kernels a decoding step asks for: a new call in a layer goes red. On a GPU they are what a step takes."""

from __future__ import annotations

import pytest

from tests.simulated_device.client import Device

pytestmark = pytest.mark.xdist_group("simulated device")
LAUNCHES = {
    "has_adapter=True": (23, 35),
    "has_adapter=True, copies=False": (30, 35),
    "has_adapter=False": (19, 35),
}
"""Launches for each token of a batch in each layer, and beside the layers, where weights may be copied or not."""


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
