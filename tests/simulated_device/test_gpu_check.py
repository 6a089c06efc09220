"""``make gpu-check`` on the simulated device: a page about a device that is said to be none, and what failed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulated_device.client import Device

pytestmark = pytest.mark.xdist_group("simulated device")


def test_gpu_check_runs_a_stage_and_writes_a_page(device: Device, tmp_path: Path) -> None:
    arguments = ["--only", "stages", "--stages", "sft-lora", "--pages", str(tmp_path)]
    outcome = device.execute(f"from benchmarks.gpu_check.__main__ import main\nresult = main({arguments!r})")
    assert outcome.error == ""
    assert outcome.result == 0
    text = (tmp_path / "simulated-cuda-device.md").read_text()
    assert "**Not a card:** a simulated device." in text
    assert "1 of 1 checks passed" in text
    assert "| stages that ran | 2.0 |" in text  # the other is in float32
