"""A stage that runs benchmarks, as a plan sees it: the tasks, what cannot run, and what a result covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment.config.sweep import ObjectiveConfig
from alignment.core.errors import AlignmentError, ConfigError, DataError
from alignment.pipeline.execute.plan_table import show_plan
from alignment.pipeline.execute.rehearsal import rehearse
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.pipeline.sweeps import objectives, reported
from tests.hub import COMMIT, leave_data_set, use_cache
from tests.unit.pipeline.test_rehearsal import Commands, stages_in, started

__all__ = ["started"]

TASKS = Path(__file__).parents[2] / "data" / "tasks"
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

MakeBenchmark = Callable[..., Plan]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one task of our own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(TASK)
    (folder / "sums.jsonl").write_text(ROWS)
    return folder


@pytest.fixture
def benchmark(tmp_path: Path, overrides: list[str], folder: Path) -> MakeBenchmark:
    """Plans the recipe above with the folder's task and more overrides."""
    recipe = tmp_path / "benchmark.yaml"
    recipe.write_text(RECIPE)
    common_overrides = [text for text in overrides if text.startswith(("output", "model", "stages.sft"))]
    common_overrides += ["stages.benchmark.tasks=[sums]", f"stages.benchmark.task_folders=['{folder}']"]
    return lambda *more: make_plan(str(recipe), [*common_overrides, *more])


def stage(plan: Plan) -> PlannedStage:
    return plan.stages[-1]


def add(folder: Path, name: str, text: str, *, base: str = "") -> None:
    """Another file beside the task's; ``base`` includes the task's own."""
    (folder / f"{name}.yaml").write_text((f"include: {base}\n" if base else "") + text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=[]", "stages.benchmark.tasks: is empty; list names of tasks, groups or tags in task_folders"),
        (
            "task_folders=[]",
            "stages.benchmark.task_folders: is empty; list folders with the tasks' YAML files, or harness:",
        ),
        ("tasks=[sumz]", "stages.benchmark.tasks[0]: no task 'sumz' in task_folders; did you mean 'sums'?"),
        (
            "tasks=[sums,sums]",
            "stages.benchmark.tasks[1]: 'sums' contains the task 'sums', and so does 'sums'; list it only once",
        ),
        ("task_folders=[nowhere]", "stages.benchmark.task_folders[0]: no folder "),
        ("task_folders=['harness:nowhere']", "stages.benchmark.task_folders[0]: no folder "),
        (
            "arms=['base+prompt']",
            "stages.benchmark.arms[0]: 'base+prompt' changes prompts, but here the prompts belong to the tasks",
        ),
        ("arms=['stage:sfd']", "stages.benchmark.arms[0]: no stage 'sfd' in this run; did you mean 'sft'?"),
        ("limit=0", "stages.benchmark.limit"),
        ("num_fewshots=3", "unknown key; did you mean 'num_fewshot'?"),
    ],
)
def test_settings_that_cannot_be_right_are_named(benchmark: MakeBenchmark, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        benchmark(f"stages.benchmark.{override}")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class: !function tasks.Mine", "is written in Python (class), which is not supported"),
        ("unsafe_code: true", "runs programs that a model wrote (unsafe_code), which this stage never does"),
        ("doc_to_image: picture", "shows a model more than text (doc_to_image)"),
        ("test_split: null", "does not say which rows to use; set test_split or validation_split"),
        (
            "metric_list: [{metric: bleurt, hf_evaluate: true}]",
            "loads the metric 'bleurt' from a hub (hf_evaluate), but ",
        ),
        (
            "generation_kwargs: {do_sample: true, temperature: 0.7}",
            "samples its answers, but this stage decodes greedily",
        ),
        ("dataset_path: null", "does not name its data; set dataset_path, such as json with data_files"),
        ("dataset_kwargs: null", "reads json but does not name a file; set dataset_kwargs: {data_files: …}"),
        (
            "dataset_kwargs: {data_files: {test: hf://datasets/org/name/rows.jsonl}}",
            "reads hf://datasets/org/name/rows.jsonl, but stages have no network; download the file and name it",
        ),
        (
            "dataset_path: org/name\ndataset_kwargs: {data_files: {test: part/rows.csv}}",
            "chooses files of the hub's data set org/name (data_files, data_dir), which this stage does not support; ",
        ),
        ("dataset_path: ./rows", "has dataset_path './rows', which is not a folder relative to the task's file; give"),
    ],
)
def test_what_a_stage_cannot_do_with_a_task_is_named_with_its_file(
    benchmark: MakeBenchmark, folder: Path, change: str, message: str
) -> None:
    add(folder, "changed", f"task: changed\n{change}\n", base="sums.yaml")
    with pytest.raises(ConfigError) as caught:
        benchmark("stages.benchmark.tasks=[changed]")
    assert f"stages.benchmark.tasks[0]: 'changed' ({folder / 'changed.yaml'}) {message}" in str(caught.value)


def test_examples_that_the_harness_would_ignore_are_refused(benchmark: MakeBenchmark, folder: Path) -> None:
    add(folder, "without", "task: without\nnum_fewshot: 0\n", base="sums.yaml")
    benchmark("stages.benchmark.tasks=[without]")
    with pytest.raises(ConfigError, match="sets num_fewshot: 0 in its file, which the harness never overrides"):
        benchmark("stages.benchmark.tasks=[without]", "stages.benchmark.num_fewshot=3")


def test_a_folder_without_tasks_is_refused(benchmark: MakeBenchmark, folder: Path) -> None:
    (folder / "sums.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ConfigError, match=r"has no task: no \*\.yaml file in it has task: NAME"):
        benchmark()


def test_tasks_have_a_folder_of_their_own(benchmark: MakeBenchmark, folder: Path) -> None:
    """All of a folder's content counts, so results in it would make every run a new one."""
    with pytest.raises(ConfigError, match="also contains this run's output, so its content changes; put tasks in"):
        benchmark(f"stages.benchmark.task_folders=['{folder.parent}']")


def test_two_tasks_of_a_name_are_named_with_their_files(benchmark: MakeBenchmark, folder: Path) -> None:
    (folder / "more").mkdir()
    shutil.copy(folder / "sums.yaml", folder / "more" / "again.yaml")
    with pytest.raises(ConfigError) as caught:
        benchmark()
    assert f"two files are called 'sums': {folder / 'more/again.yaml'} and {folder / 'sums.yaml'}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "cannot be read: while parsing"),
        ("- task", "is not a group of settings"),
        ("include: gone.yaml", "cannot be read, which "),
        ("include: broken.yaml", "includes itself"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(benchmark: MakeBenchmark, folder: Path, text: str, message: str) -> None:
    add(folder, "broken", text)
    with pytest.raises(ConfigError, match=r"task_folders\[0\]: .*(broken|gone)\.yaml") as caught:
        benchmark()
    assert message in str(caught.value)


def test_data_that_is_missing_is_an_error_of_data(benchmark: MakeBenchmark, folder: Path) -> None:
    (folder / "sums.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        benchmark()
    assert caught.value.exit_code == 3
    assert f"stages.benchmark.tasks: sums: {folder / 'sums.jsonl'}: no such file" in str(caught.value)
    assert "paths are relative to the file that names them" in str(caught.value)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "lm-evaluation-harness is not installed; pip install 'lm_eval>=0.4.13,<0.4.14'"),
        ("0.4.9.1", "lm-evaluation-harness has version 0.4.9.1, and this stage needs 0.4.13; pip install "),
        ("0.4.130", "lm-evaluation-harness has version 0.4.130, and this stage needs 0.4.13; pip install "),
    ],
)
def test_without_the_harness_s_release_the_plan_says_what_to_install(
    benchmark: MakeBenchmark, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    installed = metadata.version

    def version_of(package: str) -> str:
        if package != "lm_eval":
            return installed(package)
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", version_of)
    with pytest.raises(ConfigError) as caught:
        benchmark()
    assert f"stages.benchmark.kind: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "minimize", "fault"),
    [
        ("sums/exact_match/sft", False, ""),
        ("sums/ter/sft", True, ""),
        ("sums/ter/sft", False, "the less sums/ter/sft the better; set minimize: true"),
        ("sums/ter,strict/sft", False, "the less sums/ter,strict/sft the better; set minimize: true"),
        ("sums/term_match/sft", False, ""),
        ("sumz/ter/sft", True, "stage 'benchmark' reports no 'sumz/ter/sft'; one of: rows, rows_left_out, sums/…"),
        ("rows", False, ""),
    ],
)
def test_a_sweep_may_ask_for_the_metric_of_a_task(
    benchmark: MakeBenchmark, metric: str, minimize: bool, fault: str
) -> None:
    asked = ObjectiveConfig(stage="benchmark", metric=metric, minimize=minimize)
    faults = [problem.message for problem in objectives.faults([asked], benchmark().config.stages)]
    assert faults == ([fault] if fault else [])


# ---- groups, tags and includes ---------------------------------------------------------------------------------------


def test_a_group_and_a_tag_stand_for_their_tasks(benchmark: MakeBenchmark, folder: Path) -> None:
    add(folder, "differences", "task: differences\ntag: [hard, arithmetic]\n", base="sums.yaml")
    add(folder, "products", "task: products\ntag: hard\n", base="sums.yaml")
    add(
        folder,
        "all",
        "group: all\ntask: [sums, {group: inner, task: [differences, {task: products, num_fewshot: 2}]}]\n",
    )
    for name in ("all", "hard"):
        plan = benchmark(f"stages.benchmark.tasks=[{name}]")
        config = stage(plan).config
        assert reported.missing(config, "products/exact_match/sft", "benchmark") == ""
    assert "reports no 'sumz/exact_match/sft'" in reported.missing(config, "sumz/exact_match/sft", "benchmark")
    with pytest.raises(
        ConfigError, match="'all' contains the task 'differences', and so does 'hard'; list it only once"
    ):
        benchmark("stages.benchmark.tasks=[hard,all]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group: all\ntask: [sums, gone]\n", "no task 'gone' in task_folders"),
        ("group: all\ntask: [sums, all]\n", "the group 'all' contains itself"),
        ("group: all\ntask: [3]\n", "the group 'all' has a member that is neither a name nor a task: 3"),
        ("group: all\ntask: [{task: sums, dataset_path: csv}]\n", "the group 'all' sets dataset_path for its tasks"),
        ("group: all\ndataset_path: csv\ntask: [sums]\n", "the group 'all' sets dataset_path for its tasks"),
    ],
)
def test_a_group_that_cannot_be_run_is_named(benchmark: MakeBenchmark, folder: Path, text: str, message: str) -> None:
    add(folder, "all", text)
    with pytest.raises(ConfigError) as caught:
        benchmark("stages.benchmark.tasks=[all]")
    assert message in str(caught.value)


# ---- what a result covers --------------------------------------------------------------------------------------------


def test_a_result_depends_on_what_the_files_hold_and_not_on_where_they_are(
    benchmark: MakeBenchmark, folder: Path, tmp_path: Path
) -> None:
    before = stage(benchmark()).fingerprint
    assert (
        stage(benchmark("stages.benchmark.micro_batch_tokens=7", "stages.benchmark.batch_size=1")).fingerprint == before
    )
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "__pycache__").mkdir()
    (moved / "__pycache__" / "words.cpython-311.pyc").write_bytes(b"compiled")
    assert stage(benchmark(f"stages.benchmark.task_folders=['{moved}']")).fingerprint == before
    for setting in ("limit=5", "num_fewshot=1", "apply_chat_template=true", "max_length=99", "max_new_tokens=9"):
        assert stage(benchmark(f"stages.benchmark.{setting}")).fingerprint != before, setting
    for name, text in (("sums.yaml", "target_delimiter: ''\n"), ("sums.jsonl", ROWS), ("words.py", "X = 1\n")):
        path = folder / name
        content = path.read_text() if path.exists() else ""
        path.write_text(content + text)
        after = stage(benchmark()).fingerprint
        assert after != before, name
        before = after


def test_data_elsewhere_and_the_harness_s_version_are_covered_too(
    benchmark: MakeBenchmark, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "elsewhere.jsonl"
    rows.write_text(ROWS)
    (folder / "sums.yaml").write_text(TASK.replace("sums.jsonl", str(rows)))
    planned = stage(benchmark())
    assert set(planned.identity["files"]) == {"lm_eval", "task_folders[0]", "data of sums"}
    assert str(tmp_path) not in json.dumps(planned.identity)
    rows.write_text(ROWS * 2)
    assert stage(benchmark()).fingerprint != planned.fingerprint
    rows.write_text(ROWS)
    assert stage(benchmark()).fingerprint == planned.fingerprint
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.13.1" if name == "lm_eval" else installed(name))
    assert stage(benchmark()).fingerprint != planned.fingerprint


@pytest.mark.parametrize("changed", ["common.yaml", "clean.py", ".rows.jsonl"])
def test_what_a_task_reads_beside_its_folder_and_hidden_data_in_it_are_covered_too(
    benchmark: MakeBenchmark, folder: Path, tmp_path: Path, changed: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    files = {
        "common.yaml": shared / "common.yaml",
        "clean.py": shared / "clean.py",
        ".rows.jsonl": folder / ".rows.jsonl",
    }
    common = TASK.removeprefix("task: sums\n").replace("sums.jsonl", "../tasks/.rows.jsonl")
    files["common.yaml"].write_text(f"{common}process_docs: !function clean.rows\n")
    files["clean.py"].write_text("def rows(data):\n    return data\n")
    files[".rows.jsonl"].write_text(ROWS)
    (folder / "sums.yaml").write_text("include: ../shared/common.yaml\ntask: sums\n")
    planned = stage(benchmark())
    assert str(tmp_path) not in json.dumps(planned.identity)
    files[changed].write_text(f"{files[changed].read_text()}\n")
    assert stage(benchmark()).fingerprint != planned.fingerprint


def test_a_plan_says_which_code_of_yours_runs(benchmark: MakeBenchmark, folder: Path) -> None:
    (folder / "clean.py").write_text("raise SystemExit('a plan runs nothing')\n")
    add(folder, "cleaned", "task: cleaned\nprocess_docs: !function clean.rows\n", base="sums.yaml")
    screen = StringIO()
    show_plan(Console(file=screen, width=200), benchmark("stages.benchmark.tasks=[cleaned]"))
    assert f"benchmark runs your code: {folder}/clean.py:rows\n" in screen.getvalue()
    assert stage(benchmark()).code == ()


def test_a_link_is_read_where_it_leads_to(benchmark: MakeBenchmark, folder: Path, tmp_path: Path) -> None:
    """As the harness reads it: the functions are those beside the file, not beside the link."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "clean.py").write_text("def rows(data):\n    return data\n")
    (shared / "rows.jsonl").write_text(ROWS)
    linked = TASK.replace("sums", "linked").replace("linked.jsonl", "rows.jsonl")
    (shared / "linked.yaml").write_text(f"{linked}process_docs: !function clean.rows\n")
    (folder / "linked.yaml").symlink_to(shared / "linked.yaml")
    planned = stage(benchmark("stages.benchmark.tasks=[linked]"))
    assert planned.code == (f"{shared}/clean.py:rows",)
    assert set(planned.identity["files"]) == {"lm_eval", "task_folders[0]", "data of linked", "files of linked"}


def test_the_worker_gets_absolute_folders(
    benchmark: MakeBenchmark, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    planned = stage(benchmark("stages.benchmark.task_folders=[tasks]"))
    assert planned.config.task_folders == [str(folder)]  # type: ignore[attr-defined]


def test_a_data_set_of_a_hub_is_fetched_by_the_run_and_known_by_its_commit(
    benchmark: MakeBenchmark, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(monkeypatch, tmp_path)
    add(folder, "public", "task: public\ndataset_path: org/name\ndataset_kwargs: {revision: v1}\n", base="sums.yaml")
    screen = StringIO()
    plan = benchmark("stages.benchmark.tasks=[public]")
    show_plan(Console(file=screen, width=200), plan)
    assert "benchmark reads hub:org/name@v1, which the run will download" in screen.getvalue()
    leave_data_set(tmp_path, {"data/test.jsonl": ROWS}, revision="v1")
    planned = stage(benchmark("stages.benchmark.tasks=[public]"))
    assert planned.identity["extra_data"] == {"hub:org/name@v1": f"hub:org/name@{COMMIT}"}
    assert planned.extra_data["hub:org/name@v1"].name == COMMIT


def test_tasks_that_the_harness_ships_are_named_by_their_folder(benchmark: MakeBenchmark) -> None:
    planned = stage(benchmark("stages.benchmark.tasks=[arc_easy]", "stages.benchmark.task_folders=['harness:arc']"))
    assert [source.source for source in planned.hub_data] == ["hub:allenai/ai2_arc@main"]
    assert planned.code == (), "the harness's own functions are not the user's"
    assert planned.config.task_folders == ["harness:arc"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("init", ["base", "path:{}"], ids=["the run's base", "another base"])
def test_tasks_are_tried_before_training_whatever_base_an_arm_began_as(
    benchmark: MakeBenchmark, folder: Path, tmp_path: Path, started: Commands, init: str
) -> None:
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    (folder / "sums.yaml").write_text(TASK.replace("answer", "!function needs.target"))
    (folder / "needs.py").write_text("def target(doc):\n    import no_such_package\n")
    planned = benchmark(f"stages.sft.init={init.format(tmp_path / 'other')}")
    with pytest.raises(AlignmentError, match="pip install no_such_package"):
        rehearse(planned, planned.stages, announce=[].append)
    assert [stages_in(command) for command in started] == [["--rows", "--scorers", "--model", "benchmark"]]
