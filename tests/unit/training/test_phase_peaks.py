"""The resident memory of each phase: a phase's own peak, not that of the whole process."""

from __future__ import annotations

import sys

import pytest

from alignment.training.phase_peaks import PhasePeaks

LARGE = 300 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")


def test_each_phase_has_its_own_peak() -> None:
    peaks = PhasePeaks()
    peaks.begin("small")
    peaks.begin("large")
    block = bytearray(b"x") * LARGE
    del block
    peaks.begin("small again")
    peaks.end()
    assert peaks.resident["large"] > peaks.resident["small"] + 0.9 * LARGE
    assert peaks.resident["small again"] < peaks.resident["large"] - 0.5 * LARGE


def test_a_phase_that_returns_keeps_its_highest_peak() -> None:
    peaks = PhasePeaks()
    peaks.begin("training")
    block = bytearray(b"x") * LARGE
    del block
    peaks.begin("validating")
    peaks.begin("training")
    peaks.end()
    assert peaks.resident["training"] > peaks.resident["validating"] + 0.5 * LARGE
