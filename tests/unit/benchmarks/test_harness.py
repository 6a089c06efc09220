"""How a contestant is started, and what becomes a table."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.core import hardware
from alignment.pipeline.backends.environment import CPU_MEMORY, WAITING_SETTINGS, idle_threads
from benchmarks import harness, machine
from benchmarks import measurement as measurement_module
from benchmarks.grid import GOALS, start_of
from benchmarks.harness import Options, turns
from benchmarks.measurement import Circumstances, Failed, Measurement, command_of, taken
from benchmarks.work import Contestant
from benchmarks.works import WORKS


def _environment(work: str, contestant: str, task: dict[str, str]) -> dict[str, str]:
    """The variables with which a contestant is started."""
    return _variables(_measurement(work, contestant, WORKS[work].contestants[contestant]), task)


def _measurement(work: str, name: str, how: Contestant) -> Measurement:
    return Measurement(
        work=WORKS[work],
        name=name,
        how=how,
        repetition=0,
        inputs={},
        base=Path("base"),
        folder=Path("folder"),
        python="python",
    )


def _variables(measurement: Measurement, task: dict[str, str]) -> dict[str, str]:
    command = command_of(measurement, task, Path("task.json"), Circumstances(threads=2, amx=True))
    return dict(command.environment)


@pytest.mark.parametrize(("contestant", "policy"), [("ours", idle_threads()), ("spinning", {})])
def test_a_contestant_whose_threads_spin_has_no_word_on_how_they_wait(
    monkeypatch: pytest.MonkeyPatch, contestant: str, policy: dict[str, str]
) -> None:
    for name in WAITING_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    environment = _environment("neighbour", contestant, {"stage_file": "stage.yaml"})
    assert {name: environment[name] for name in WAITING_SETTINGS if name in environment} == policy


@pytest.mark.parametrize(("contestant", "has_them"), [("trl_default", True), ("trl_as_it_comes", False)])
def test_trl_as_it_comes_has_none_of_our_settings_of_memory(
    monkeypatch: pytest.MonkeyPatch, contestant: str, has_them: bool
) -> None:
    for name in (*CPU_MEMORY, *WAITING_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    environment = _environment("sft_lora", contestant, {})
    assert (CPU_MEMORY.keys() <= environment.keys()) is has_them
    assert bool(CPU_MEMORY.keys() & environment.keys()) is has_them
    assert environment["OMP_NUM_THREADS"] == "2"


def test_trl_as_it_comes_has_no_word_on_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert not idle_threads().keys() & _environment("sft_lora", "trl_as_it_comes", {}).keys()


@pytest.mark.parametrize(("work", "library"), [("sft_lora", "trl"), ("sft_lora", "stock"), ("sampling", "generate")])
def test_a_rival_whose_setting_compiles_may_compile(work: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(hardware, "count_devices", lambda: 0)
    rival = WORKS[work].rivals[library]
    start = start_of(rival.axes)
    compiled = {axis.name: value for axis in rival.axes for value in axis.needs_compiler}
    assert "TORCHDYNAMO_DISABLE" in _variables(_measurement(work, "any", rival.contestant(start)), {})
    measurement = _measurement(work, "any", rival.contestant({**start, **compiled}))
    assert "TORCHDYNAMO_DISABLE" not in _variables(measurement, {})


def test_a_measurement_in_which_nothing_was_compiled_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the steps that only compiled are left out."""
    rival = WORKS["dpo_lora"].rivals["stock"]
    monkeypatch.setattr(measurement_module, "_padded", lambda measurement: [])

    def entry(compiled: bool, graphs: int) -> object:
        result = {"seconds": [1.0], "losses": [2.0, 1.9, 1.8, 1.7, 1.6, 1.5], "compiled_graphs": graphs}

        def run(command: object, log: Path, **_: object) -> None:
            (log.parent / "result.json").write_text(json.dumps(result))

        monkeypatch.setattr(measurement_module, "run", run)
        how = rival.contestant({**start_of(rival.axes), "layers_compiled": compiled})
        rows = {"repetitions": [{"tokens": "tokens.json"}]}
        measurement = replace(_measurement("dpo_lora", "stock", how), folder=tmp_path, inputs=rows)
        outcome = taken(measurement, Circumstances(threads=2, amx=True))
        return outcome.get("error") or outcome["result"]["losses"]

    entries = {(compiled, graphs): entry(compiled, graphs) for compiled in (False, True) for graphs in (0, 1)}
    three = [2.0, 1.9, 1.8]
    assert entries == {
        (False, 0): three,
        (False, 1): three,
        (True, 0): "torch.compile compiled nothing",
        (True, 1): three,
    }


def test_nobody_is_always_first_or_behind_the_same_contestant() -> None:
    assert ["".join(turns(["a", "b", "c", "d"], repetition)) for repetition in range(5)] == [
        *("abcd", "badc", "cdab", "dcba", "abcd")
    ]
    assert turns([], 1) == []


def test_contestants_take_turns_in_each_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, str]] = []
    monkeypatch.setattr(harness, "base_model", lambda: tmp_path)
    monkeypatch.setattr(harness, "prepared", lambda work, options, base, folder: {})
    monkeypatch.setattr(harness, "code_sha256", lambda: "same")
    monkeypatch.setattr(harness, "summarise", lambda *_: {})
    monkeypatch.setattr(harness, "_write", lambda *_: tmp_path)
    monkeypatch.setattr(
        harness,
        "taken",
        lambda measurement, circumstances: order.append((measurement.repetition, measurement.name)) or {},
    )
    harness.measure("neighbour", _options(tmp_path, "ours", "spinning", repetitions=2))
    assert order == [(0, "ours"), (0, "spinning"), (1, "spinning"), (1, "ours")]


def test_a_contestant_that_another_stands_for_is_not_left_out_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = start_of(WORKS["sampling"].rivals["generate"].axes)
    choices = {f"{library}_{goal}": start for library in ("generate", "generate_float32") for goal in GOALS}
    monkeypatch.setattr(harness, "base_model", lambda: tmp_path)
    monkeypatch.setattr(harness, "versions_of", lambda work: {})
    monkeypatch.setattr(harness, "choices_of", lambda *_: choices)
    with pytest.raises(Failed, match="generate_fastest: the search chose the setting of another contestant"):
        harness.measure("sampling", _options(tmp_path, "ours", "generate_fastest"))


@pytest.mark.parametrize("name", [name for name, work in WORKS.items() if work.rivals])
def test_everybody_is_warmed_up_by_one_step_and_measured_for_as_many(name: str) -> None:
    work = WORKS[name]
    measured = 1 if work.kind == "ppo" else 2
    assert {how.measured for how in work.contestants.values()} == {measured}
    assert work.batches == (1 if work.kind == "sampling" else 1 + measured), "a row for each step"


def _options(results: Path, *contestants: str, repetitions: int = 5) -> Options:
    return Options(repetitions=repetitions, contestants=contestants, data=None, threads=2, amx=False, results=results)


@pytest.mark.parametrize(
    ("name", "contestants", "repetitions", "fails", "stem"),
    [
        ("neighbour", (), 5, False, "neighbour-no-amx"),
        ("neighbour", (), 5, True, "neighbour-no-amx-partial"),
        ("neighbour", (), 4, False, "neighbour-no-amx-partial"),
        ("neighbour", ("ours",), 5, False, "neighbour-no-amx-partial"),
    ],
)
def test_only_a_whole_run_of_committed_code_is_published(
    name: str,
    contestants: tuple[str, ...],
    repetitions: int,
    fails: bool,
    stem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {"models": {"base": {"linear": 1, "head": 1}}, "repetitions": [{"steps": [{}]}] * 5}
    monkeypatch.setattr(harness, "base_model", lambda: tmp_path)
    monkeypatch.setattr(harness, "prepared", lambda work, options, base, folder: rows)
    monkeypatch.setattr(harness, "uncommitted_code", list)
    monkeypatch.setattr(harness, "code_sha256", lambda: "same")
    monkeypatch.setattr(
        harness,
        "taken",
        lambda measurement, circumstances: {"error": "it broke"} if fails and measurement.repetition == 2 else {},
    )
    monkeypatch.setattr(harness, "summarise", lambda *_: {"measurements": []})
    monkeypatch.setattr(harness, "_headline", lambda complete: "")
    monkeypatch.setattr(harness, "table", lambda content: "")
    options = _options(tmp_path, *contestants, repetitions=repetitions)
    assert harness.measure(name, options) == tmp_path / f"{stem}.json"
    monkeypatch.setattr(harness, "uncommitted_code", lambda: ["benchmarks/grid.py"])
    if stem.endswith("partial") and not fails:
        assert harness.measure(name, options) == tmp_path / f"{stem}.json"
    else:
        with pytest.raises(Failed, match=r"1 files of the code are not committed \(benchmarks/grid\.py\)"):
            harness.measure(name, options)


def test_uncommitted_code_is_that_of_both_packages_and_no_result(tmp_path: Path) -> None:
    assert machine.uncommitted_code(tmp_path) == []
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for name in ("alignment/stages/run.py", "benchmarks/grid.py", "benchmarks/results/sft.json", "tests/test.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    assert machine.uncommitted_code(tmp_path) == ["alignment/stages/run.py", "benchmarks/grid.py"]
