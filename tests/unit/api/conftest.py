"""What the tests of the Python API share with those of plans, sweeps and reports."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from alignment.api import calls
from tests.unit.pipeline.conftest import each_set_of_files_is_composed_once, overrides, processor
from tests.unit.pipeline.sweeps.conftest import runs, tiny_base
from tests.unit.pipeline.test_run import fake
from tests.unit.report.conftest import FakeRun, fake_run

__all__ = ["FakeRun", "each_set_of_files_is_composed_once", "fake_run", "overrides", "processor", "runs", "tiny_base"]


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` does all that it does, with real processes that train nothing."""
    with_fakes = functools.partial(calls.run_with_advice, command_for=fake)
    monkeypatch.setattr(calls, "run_with_advice", with_fakes)


@pytest.fixture
def run_folder(overrides: list[str]) -> Path:
    return Path(overrides[0].removeprefix("output=")) / "runs/quickstart"
