"""Fixtures of every test of sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.pipeline.sweeps import run as module
from tests.hub import weights_file
from tests.unit.pipeline.sweeps.fake_runs import Runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Runs:
    fake = Runs(tmp_path, lambda settings: 0.9 - abs(float(settings["stages.dpo.beta"]) - 0.3))
    monkeypatch.setattr(module, "run_trial", fake)
    return fake


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """A folder that a plan takes for a model."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights_file())
    return folder
