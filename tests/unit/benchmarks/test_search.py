"""How contestants are started and searched for their settings, and what becomes a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.pipeline.backends.command import CPU_MEMORY, WAITING_SETTINGS, idle_threads
from benchmarks import harness, search_run
from benchmarks import measurement as measurement_module
from benchmarks.counts import padded_tokens
from benchmarks.grid import FASTEST, LEANEST, Axis, Setting, start_of
from benchmarks.harness import Options, turns
from benchmarks.measurement import Circumstances, Failed, Measurement, command_of, taken
from benchmarks.search import CannotStart, Trial, search
from benchmarks.search_run import Trying, trial_of
from benchmarks.searched import NoSearch, choices_of, code_of, fixed_of, grid_of, search_file, write_search
from benchmarks.work import Contestant, with_choices
from benchmarks.works import WORKS


@pytest.mark.parametrize(
    ("work", "contestant", "memory", "waits"),
    [
        ("neighbour", "ours", True, True),
        ("neighbour", "spinning", True, False),
        ("sft_lora", "trl_default", True, True),
        ("sft_lora", "trl_as_it_comes", False, False),
    ],
)
def test_a_contestant_is_started_with_our_variables_unless_it_takes_part_as_it_comes(
    work: str, contestant: str, memory: bool, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*CPU_MEMORY, *WAITING_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    task = {"stage_file": "stage.yaml"} if work == "neighbour" else {}
    environment = _variables(measurement_of(work, contestant, WORKS[work].contestants[contestant]), task)
    assert {name: value for name, value in environment.items() if name in WAITING_SETTINGS} == (
        idle_threads() if waits else {}
    )
    assert (CPU_MEMORY.keys() <= environment.keys()) is bool(CPU_MEMORY.keys() & environment.keys()) is memory
    assert environment["OMP_NUM_THREADS"] == "2"


def measurement_of(work: str, name: str, how: Contestant) -> Measurement:
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
        measurement = replace(measurement_of("dpo_lora", "stock", how), folder=tmp_path, inputs=rows)
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


def _options(results: Path, *contestants: str, repetitions: int = 5) -> Options:
    return Options(repetitions=repetitions, contestants=contestants, data=None, threads=2, amx=False, results=results)


@pytest.mark.parametrize(
    ("contestants", "repetitions", "fails", "stem"),
    [
        ((), 5, False, "neighbour-no-amx"),
        ((), 5, True, "neighbour-no-amx-partial"),
        ((), 4, False, "neighbour-no-amx-partial"),
    ],
)
def test_only_a_whole_run_of_committed_code_is_published(
    contestants: tuple[str, ...], repetitions: int, fails: bool, stem: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    order: list[tuple[int, str]] = []

    def taken_by(measurement: Measurement, circumstances: Circumstances) -> dict[str, str]:
        order.append((measurement.repetition, measurement.name))
        return {"error": "it broke"} if fails and measurement.repetition == 2 else {}

    rows = {"models": {"base": {"linear": 1, "head": 1}}, "repetitions": [{"steps": [{}]}] * 5}
    monkeypatch.setattr(harness, "base_model", lambda: tmp_path)
    monkeypatch.setattr(harness, "prepared", lambda work, options, base, folder: rows)
    monkeypatch.setattr(harness, "uncommitted_code", list)
    monkeypatch.setattr(harness, "code_sha256", lambda: "same")
    monkeypatch.setattr(harness, "taken", taken_by)
    monkeypatch.setattr(harness, "summarise", lambda *_: {"measurements": []})
    monkeypatch.setattr(harness, "_headline", lambda complete: "")
    monkeypatch.setattr(harness, "table", lambda content: "")
    options = _options(tmp_path, *contestants, repetitions=repetitions)
    assert harness.measure("neighbour", options) == tmp_path / f"{stem}.json"
    if not contestants:
        first, second = ([name for number, name in order if number == repetition] for repetition in (0, 1))
        assert first != second == turns(first, 1), "they take turns"
    monkeypatch.setattr(harness, "uncommitted_code", lambda: ["benchmarks/grid.py"])
    if stem.endswith("partial") and not fails:
        assert harness.measure("neighbour", options) == tmp_path / f"{stem}.json"
    else:
        with pytest.raises(Failed, match=r"benchmarks/grid\.py"):
            harness.measure("neighbour", options)


AXES = (
    Axis(name="micro_rows", values={8: "8 rows", 4: "4 rows", 1: "1 row"}),
    Axis(name="checkpointing", values={True: "checkpointing", False: "none"}),
    Axis(name="attention", values={"sdpa": "sdpa", "eager": "eager"}),
    Axis(name="compiled", values={False: "", True: "compiled"}, needs_compiler=(True,), goals=(FASTEST,)),
)


class Library:
    """Fewer rows are faster and leaner, checkpointing is slower and leaner, eager attention is slower and larger."""

    def __init__(self) -> None:
        self.asked: list[tuple[Setting, bool]] = []

    def measure(self, setting: Setting, final: bool) -> Trial:
        self.asked.append((setting, final))
        speed = {8: 10.0, 4: 20.0, 1: 30.0}[int(setting["micro_rows"])]
        memory = {8: 8.0, 4: 4.0, 1: 2.0}[int(setting["micro_rows"])]
        speed *= (0.5 if setting["checkpointing"] else 1.0) * (0.5 if setting["attention"] == "eager" else 1.0)
        memory *= (0.5 if setting["checkpointing"] else 1.0) * (2.0 if setting["attention"] == "eager" else 1.0)
        return Trial(setting=setting, final=final, speed=speed, peak_memory=memory, losses=(2.0,) * (3 if final else 1))


def _setting(rows: int, checkpointing: bool, attention: str = "sdpa", *, compiled: bool = False) -> dict[str, Any]:
    return {"micro_rows": rows, "checkpointing": checkpointing, "attention": attention, "compiled": compiled}


def test_each_axis_is_tried_from_the_fastest_and_from_the_leanest_so_far() -> None:
    library = Library()
    chosen = search(AXES, library.measure, tolerance=0.01, rounds=2)
    assert chosen == {FASTEST: _setting(1, False), LEANEST: _setting(1, True)}
    first = [(8, True), (4, True), (1, True), (1, False), (1, False, "eager"), (1, True, "eager")]
    compiled = _setting(1, False, compiled=True)
    again = [_setting(8, True), _setting(1, False), compiled, _setting(1, True)]
    assert library.asked == [
        *((_setting(*values), False) for values in first),
        (compiled, False),
        *((setting, True) for setting in again * 2),
    ]


def test_the_speed_of_a_trial_is_of_the_rows_of_its_steps_or_of_its_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_run, "refuse_other_code", lambda conditions: None)
    result = {"seconds": [3.0], "matmul_peak": 1e3, "peak_memory": 7, "losses": [1.5]}
    monkeypatch.setattr(search_run, "taken", lambda measurement, circumstances: {"result": result})
    trial = _trying("sft_lora", "trl").trial(start_of(WORKS["sft_lora"].rivals["trl"].axes), False)
    assert (trial.speed, trial.peak_memory, trial.losses, trial.failure) == (30.0, 7.0, (1.5,), None), "no warm-up"
    figures = {"seconds_per_update": 4.0, "peak_memory": 3.0, "answer_tokens": 1200.0}
    trial = trial_of(WORKS["ppo_lora"], {}, {"figures": figures, "result": {"losses": []}}, final=True)
    assert (trial.speed, trial.answers) == (0.25, 1200.0)


@pytest.mark.parametrize(("answers", "chosen"), [(800.0, True), (1300.0, False)])
def test_a_setting_that_samples_other_numbers_of_tokens_is_not_chosen(answers: float, chosen: bool) -> None:
    class Sampler(Library):
        def measure(self, setting: Setting, final: bool) -> Trial:
            tokens = answers if setting["micro_rows"] == 1 else 1000.0
            return replace(super().measure(setting, final), answers=tokens)

    fastest = search(AXES, Sampler().measure, tolerance=0.01, rounds=1)[FASTEST]
    assert (fastest["micro_rows"] == 1) is chosen


@pytest.mark.parametrize("loss", [2.03, float("nan")])
def test_a_setting_that_learns_something_else_is_not_chosen(loss: float) -> None:
    class Unlike(Library):
        """One row learns something else, which its first step shows; four rows do too, but in the last step only."""

        def measure(self, setting: Setting, final: bool) -> Trial:
            trial = super().measure(setting, final)
            wrong = {1: (loss, 2.0, 2.0), 4: (2.0, 2.0, loss)}.get(int(setting["micro_rows"]), (2.0,) * 3)
            losses = wrong[: len(trial.losses)]
            return Trial(setting=setting, final=final, speed=trial.speed, peak_memory=trial.peak_memory, losses=losses)

    library = Unlike()
    chosen = search(AXES, library.measure, tolerance=0.01, rounds=1)
    assert chosen == {goal: _setting(8, True) for goal in (FASTEST, LEANEST)}
    assert [int(setting["micro_rows"]) for setting, final in library.asked if final] == [8, 4, 4, 4]


def test_settings_that_fail_are_left_out_and_a_first_that_fails_ends_the_search() -> None:
    class Failing(Library):
        def measure(self, setting: Setting, final: bool) -> Trial:
            if setting["checkpointing"] is self.fails:
                return Trial(setting=setting, final=final, failure="it broke")
            return super().measure(setting, final)

    library = Failing()
    library.fails = False
    assert search(AXES, library.measure, tolerance=0.01, rounds=2)[FASTEST] == _setting(1, True)
    library.fails = True
    with pytest.raises(CannotStart, match="it broke"):
        search(AXES, library.measure, tolerance=0.01, rounds=2)


def test_padding_is_counted_to_the_longest_row_of_each_micro_batch() -> None:
    rows = [{"input_ids": [1] * length} for length in (5, 2, 7, 1)]
    assert [padded_tokens("sft", rows, {"micro_rows": count, "padding_free": False}) for count in (4, 2, 1)] == [
        28,
        24,
        15,
    ]
    assert padded_tokens("sft", rows, {"micro_rows": 4, "padding_free": True}) == 15
    pairs = [{"prompt": [1] * 3, "chosen": [1], "rejected": [1] * 4}, {"prompt": [1], "chosen": [1], "rejected": [1]}]
    assert padded_tokens("dpo", pairs, {"micro_rows": 2}) == 4 * 7
    assert padded_tokens("reward", pairs, {"micro_rows": 1}) == 2 * 7 + 2 * 2
    answers = [{"prompt": [1] * 3, "completion": [1], "KL_completion": [1] * 9}, {"prompt": [1], "completion": [1]}]
    assert padded_tokens("kto", answers, {"micro_rows": 2}) == 2 * 4


TOKENS = [{"tokens": 90, "trunk_tokens": 80, "scored_tokens": 9}, *[{"tokens": 50, "trunk_tokens": 4}] * 2]


def _trying(work: str, library: str) -> Trying:
    return Trying(
        work=WORKS[work],
        library=library,
        inputs={"models": {"base": {"linear": 100, "head": 10}}, "repetitions": [{"steps": TOKENS}]},
        base=Path("base"),
        folder=Path("folder"),
        python="python",
        circumstances=Circumstances(threads=2, amx=True),
        conditions={"code_sha256": "same"},
    )


WORK = WORKS["sft_lora"]
VERSIONS = {"trl": {"trl": "1.16.0", "torch": "2.13"}, "stock": {"torch": "2.13"}}
CONDITIONS = {
    "processor": {"model": "Fast CPU", "cores": 2},
    "threads": 2,
    "amx": "as found",
    "data": [{"name": "rows", "sha256": "a"}],
    "base": {"source": "model"},
    "compiler": "none",
    "launcher": {"OMP_NUM_THREADS": "2"},
    "code_sha256": "of then",
}
CHOSEN = {
    f"{library}_{goal}": {**start_of(WORK.rivals[library].axes), "micro_rows": rows}
    for library, goal, rows in (
        ("trl", "fastest", 2),
        ("trl", "leanest", 1),
        ("stock", "fastest", 4),
        ("stock", "leanest", 4),
    )
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A search of SFT."""
    path = search_file(tmp_path, "sft_lora", amx=True)
    content = {"conditions": CONDITIONS, "versions": VERSIONS, "chosen": CHOSEN, "trials": []}
    write_search(path, {**content, "grid": grid_of(WORK), "fixed": fixed_of(WORK), "code": code_of(WORK)})
    return path


def test_a_table_takes_the_settings_that_the_search_chose(file: Path) -> None:
    choices = choices_of(file, "sft_lora", WORK, {**CONDITIONS, "code_sha256": "of now"}, VERSIONS)
    contestants = with_choices(WORK, choices).contestants
    assert {name: how.setting.get("micro_rows") for name, how in contestants.items()} == {
        "ours": None,
        "ours_recomputed": None,
        "trl_default": 8,
        "trl_as_it_comes": 8,
        "trl_fastest": 2,
        "trl_leanest": 1,
        "stock_fastest": 4,
    }
    assert "4 micro-batches of 2, padded, gradient checkpointing, bf16 autocast, PEFT's input casts" in (
        contestants["trl_fastest"].allowed
    )
    assert contestants["stock_fastest"].allowed.endswith("(this is also its leanest setting)")
    start = start_of(WORKS["sampling"].rivals["generate"].axes)
    choices = {f"{library}_fastest": start for library in ("generate", "generate_float32")}
    choices |= {f"{library}_leanest": {**start, "batch": 8} for library in ("generate", "generate_float32")}
    contestants = with_choices(WORKS["sampling"], choices).contestants
    assert [name for name in contestants if name.startswith("generate")] == [
        *("generate", "generate_leanest", "generate_float32", "generate_float32_leanest")
    ], "a default that is also the fastest takes part once"
    assert contestants["generate"].allowed.endswith("(this is also its fastest setting)")


@pytest.mark.parametrize(
    ("conditions", "trl", "reason"),
    [
        ({"processor": {"model": "Slow CPU", "cores": 2}}, "1.16.0", 'processor: "Fast CPU" then, "Slow CPU" now'),
        ({}, "1.17.0", "trl of trl: 1.16.0 then, 1.17.0 now"),
    ],
)
def test_a_search_of_other_circumstances_is_refused(
    file: Path, conditions: dict[str, Any], trl: str, reason: str
) -> None:
    versions = {**VERSIONS, "trl": {"trl": trl, "torch": "2.13"}}
    with pytest.raises(NoSearch) as refused:
        choices_of(file, "sft_lora", WORK, CONDITIONS | conditions, versions)
    assert str(refused.value).startswith(f"rivals-sft_lora.json cannot be used: {reason}")
    assert 'make bench WORK=sft_lora ARGS="--search"' in str(refused.value)
