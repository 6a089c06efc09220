"""A stage that runs benchmarks, as a plan sees it: the tasks, what cannot run, and what a result covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import AlignmentError, ConfigError, DataError
from alignment.pipeline.execute.rehearsal import rehearse
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.pipeline.sweeps import objectives
from tests.unit.pipeline.conftest import write
from tests.unit.pipeline.test_rehearsal import Commands, executed, stages_in, started

__all__ = ["executed", "started"]

RECIPE = """
defaults: [base, stage@stages.sft: sft, stage@stages.benchmark: benchmark, _self_]
stages:
  benchmark: {arms: [base, "stage:sft"]}
"""
ROWS = '{"question": "1 + 1", "answer": "2"}\n'
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["."], do_sample: false}
"""
CLEAN = "def rows(data):\n    return data\n"

Benchmark = Callable[..., Plan]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "tasks/sums.yaml", TASK)
    write(tmp_path / "tasks/sums.jsonl", ROWS)
    return tmp_path / "tasks"


@pytest.fixture
def benchmark(tmp_path: Path, overrides: list[str], folder: Path) -> Benchmark:
    recipe = write(tmp_path / "benchmark.yaml", RECIPE)
    given = [text for text in overrides if text.startswith(("output", "model", "stages.sft"))]
    given += ["stages.benchmark.tasks=[sums]", f"stages.benchmark.task_folders=['{folder}']"]

    def planned(*settings: str) -> Plan:
        return make_plan(recipe, [*given, *(f"stages.benchmark.{setting}" for setting in settings)])

    return planned


def stage(plan: Plan) -> PlannedStage:
    return plan.stages[-1]


def refused(benchmark: Benchmark, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        benchmark(*settings)
    return str(caught.value)


def add(folder: Path, name: str, text: str, *, base: str = "") -> None:
    write(folder / f"{name}.yaml", (f"include: {base}\n" if base else "") + text)


@pytest.mark.parametrize(
    ("setting", "where", "word"),
    [
        ("task_folders=[]", "task_folders", "harness:"),
        ("tasks=[sumz]", "tasks[0]", "'sums'"),
        ("tasks=[sums,sums]", "tasks[1]", "list it only once"),
        ("arms=['base+prompt']", "arms[0]", "'base+prompt'"),
    ],
)
def test_settings_that_cannot_be_right_are_named(benchmark: Benchmark, setting: str, where: str, word: str) -> None:
    message = refused(benchmark, setting)
    assert (message.startswith(f"stages.benchmark.{where}: "), word in message) == (True, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("class: !function tasks.Mine", "(class)"),
        ("metric_list: [{metric: bleurt, hf_evaluate: true}]", "'bleurt' from a hub"),
        ("generation_kwargs: {do_sample: true, temperature: 0.7}", "samples its answers"),
        ("dataset_kwargs: {data_files: {test: hf://datasets/org/name/rows.jsonl}}", "download the file"),
        ("dataset_path: org/name\ndataset_kwargs: {data_files: {test: part/rows.csv}}", "data set org/name"),
    ],
)
def test_a_task_that_cannot_be_run_is_named(benchmark: Benchmark, folder: Path, change: str, words: str) -> None:
    add(folder, "changed", f"task: changed\n{change}\n", base="sums.yaml")
    message = refused(benchmark, "tasks=[changed]")
    assert message.startswith(f"stages.benchmark.tasks[0]: 'changed' ({folder / 'changed.yaml'}) ")
    assert words in message


def test_data_that_is_missing_is_an_error_of_data(benchmark: Benchmark, folder: Path) -> None:
    (folder / "sums.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        benchmark()
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"stages.benchmark.tasks: sums: {folder / 'sums.jsonl'}: no such file")


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    installed = metadata.version

    def version_of(package: str) -> str:
        if package != "lm_eval":
            return installed(package)
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", version_of)


@pytest.mark.parametrize("version", [None, "0.4.130"])
def test_without_the_harness_the_plan_says_what_to_install(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    install(monkeypatch, version)
    message = refused(benchmark)
    assert message.startswith("stages.benchmark.kind: lm-evaluation-harness ")
    assert (version or "is not installed") in message
    assert "pip install 'lm_eval>=0.4.13,<0.4.14'" in message


def test_a_group_and_a_tag_stand_for_their_tasks(benchmark: Benchmark, folder: Path) -> None:
    add(folder, "differences", "task: differences\ntag: [hard, arithmetic]\n", base="sums.yaml")
    add(folder, "products", "task: products\ntag: hard\n", base="sums.yaml")
    inner = "{group: inner, task: [differences, {task: products, num_fewshot: 2}]}"
    add(folder, "all", f"group: all\ntask: [sums, {inner}]\n")
    for name in ("all", "hard"):
        config = stage(benchmark(f"tasks=[{name}]")).config
        assert objectives.missing(config, "products/exact_match/sft", "benchmark") == ""
    assert "reports no 'sumz/exact_match/sft'" in objectives.missing(config, "sumz/exact_match/sft", "benchmark")
    message = refused(benchmark, "tasks=[hard,all]")
    assert "'all' contains the task 'differences', and so does 'hard'" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group: all\ntask: [sums, gone]\n", "no task 'gone'"),
        ("group: all\ntask: [sums, all]\n", "the group 'all' contains itself"),
        ("group: all\ntask: [{task: sums, dataset_path: csv}]\n", "the group 'all' sets dataset_path"),
    ],
)
def test_a_group_that_cannot_be_run_is_named(benchmark: Benchmark, folder: Path, text: str, message: str) -> None:
    add(folder, "all", text)
    assert message in refused(benchmark, "tasks=[all]")


def test_a_result_depends_on_what_the_files_hold(benchmark: Benchmark, folder: Path, tmp_path: Path) -> None:
    before = stage(benchmark()).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    write(moved / "__pycache__/words.cpython-311.pyc", "compiled")
    for same in (["micro_batch_tokens=7", "batch_size=1"], [f"task_folders=['{moved}']"]):
        assert stage(benchmark(*same)).fingerprint == before
    for setting in ("limit=5", "num_fewshot=1", "apply_chat_template=true", "max_length=99", "max_new_tokens=9"):
        assert stage(benchmark(setting)).fingerprint != before, setting
    for name, text in (("sums.yaml", "target_delimiter: ''\n"), ("sums.jsonl", ROWS), ("words.py", "X = 1\n")):
        with (folder / name).open("a") as stream:
            stream.write(text)
        after = stage(benchmark()).fingerprint
        assert after != before, name
        before = after


@pytest.mark.parametrize("changed", ["shared/common.yaml", "shared/clean.py", "tasks/.rows.jsonl"])
def test_what_a_task_reads_beside_its_folder_is_covered_too(benchmark: Benchmark, tmp_path: Path, changed: str) -> None:
    common = TASK.removeprefix("task: sums\n").replace("sums.jsonl", "../tasks/.rows.jsonl")
    write(tmp_path / "shared/common.yaml", f"{common}process_docs: !function clean.rows\n")
    write(tmp_path / "shared/clean.py", CLEAN)
    write(tmp_path / "tasks/.rows.jsonl", ROWS)
    write(tmp_path / "tasks/sums.yaml", "include: ../shared/common.yaml\ntask: sums\n")
    planned = stage(benchmark())
    assert str(tmp_path) not in json.dumps(planned.identity)
    with (tmp_path / changed).open("a") as stream:
        stream.write("\n")
    assert stage(benchmark()).fingerprint != planned.fingerprint


def test_the_worker_gets_absolute_folders(benchmark: Benchmark, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    config: Any = stage(benchmark("task_folders=[tasks]")).config
    assert config.task_folders == [str(folder)]
    planned = stage(benchmark("tasks=[arc_easy]", "task_folders=['harness:arc']"))
    assert [source.source for source in planned.hub_data] == ["hub:allenai/ai2_arc@main"]
    assert planned.code == (), "the harness's own functions are not the user's"
    config = planned.config
    assert config.task_folders == ["harness:arc"]


@pytest.mark.parametrize("init", ["base", "path:{}"], ids=["the run's base", "another base"])
def test_tasks_are_tried_before_training(
    benchmark: Benchmark, folder: Path, tmp_path: Path, started: Commands, init: str
) -> None:
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    write(tmp_path / "benchmark.yaml", f"{RECIPE}  sft: {{init: '{init.format(tmp_path / 'other')}'}}\n")
    write(folder / "sums.yaml", TASK.replace("answer", "!function needs.target"))
    write(folder / "needs.py", "def target(doc):\n    import no_such_package\n")
    planned = benchmark()
    with pytest.raises(AlignmentError, match="pip install no_such_package"):
        rehearse(planned, planned.stages, announce=[].append)
    assert [stages_in(command) for command in started] == [["--rows", "--scorers", "--model", "benchmark"]]


def test_data_elsewhere_is_covered_too(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write(tmp_path / "elsewhere.jsonl", ROWS)
    write(tmp_path / "tasks/sums.yaml", TASK.replace("sums.jsonl", rows))
    planned = stage(benchmark())
    assert set(planned.identity["files"]) == {"lm_eval", "task_folders[0]", "data of sums"}
    assert str(tmp_path) not in json.dumps(planned.identity)
    write(tmp_path / "elsewhere.jsonl", ROWS * 2)
    assert stage(benchmark()).fingerprint != planned.fingerprint
    write(tmp_path / "elsewhere.jsonl", ROWS)
    assert stage(benchmark()).fingerprint == planned.fingerprint
    install(monkeypatch, "0.4.13.1")
    assert stage(benchmark()).fingerprint != planned.fingerprint
