"""Every kind of stage runs on the device: no tensor, generator or read is on the wrong side.

The adapters that ``usual_cells`` leaves out are tried by on_card.py, also on the simulated device.
"""

from __future__ import annotations

import pytest

from alignment.stages.registry import _BUILT_IN
from tests.simulated_device.conftest import Stages
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


def test_every_kind_has_a_cell() -> None:
    assert set(KINDS) | WITHOUT == set(_BUILT_IN)
