"""How a contestant is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.pipeline.backends.environment import CPU_MEMORY, WAITING_SETTINGS, idle_threads
from benchmarks import harness
from benchmarks.works import WORKS


@pytest.mark.parametrize(("contestant", "policy"), [("ours", idle_threads()), ("spinning", {})])
def test_a_contestant_whose_threads_spin_has_no_word_on_how_they_wait(
    monkeypatch: pytest.MonkeyPatch, contestant: str, policy: dict[str, str]
) -> None:
    for name in WAITING_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    measured = harness._Measurement(WORKS["neighbour"], contestant, 0, {}, Path("base"), Path("folder"), "python")
    options = harness.Options(
        repetitions=1, contestants=(), data=None, threads=2, amx=True, resume=False, results=Path("results")
    )
    environment = harness._command(measured, {"stage_file": "stage.yaml"}, Path("task.json"), options).environment
    assert {name: environment[name] for name in WAITING_SETTINGS if name in environment} == policy


@pytest.mark.parametrize(("contestant", "has_them"), [("trl_default", True), ("trl_as_it_comes", False)])
def test_trl_as_it_comes_has_none_of_our_settings_of_memory(
    monkeypatch: pytest.MonkeyPatch, contestant: str, has_them: bool
) -> None:
    for name in (*CPU_MEMORY, *WAITING_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    told = harness._Measurement(WORKS["sft_lora"], contestant, 0, {}, Path("base"), Path("folder"), "python")
    options = harness.Options(
        repetitions=1, contestants=(), data=None, threads=2, amx=True, resume=False, results=Path("results")
    )
    environment = harness._command(told, {}, Path("task.json"), options).environment
    assert (CPU_MEMORY.keys() <= environment.keys()) is has_them
    assert bool(CPU_MEMORY.keys() & environment.keys()) is has_them
    assert environment["OMP_NUM_THREADS"] == "2"
    assert idle_threads().items() <= environment.items()  # rivals wait as we do
