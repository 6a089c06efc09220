"""What is worth a word before a run starts, though nothing is wrong."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment.core import hardware
from alignment.pipeline.execute.notes import advice, of_plan
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.execute.summary import show_doubts
from alignment.report.run_page.run_files import read_run
from tests.unit.pipeline.conftest import ROWS, TURN, MakePlan, screened, write, write_rows

WITHOUT_PATCH = hardware.has_bfloat16
"""As it is, before a fixture replaces it."""
LONG = "Dear all, the training on fire safety is on 21 March at nine in room four, and lunch is at noon."


def asks(folder: Path, content: str) -> None:
    """Makes this the question of the evaluation."""
    write_rows(folder / "heldout.jsonl", {**ROWS["heldout"], "messages": [{**TURN, "content": content}]})


@pytest.fixture
def apart(tmp_path: Path, overrides: list[str]) -> None:
    """An evaluation that asks what nobody learned."""
    asks(tmp_path, "Where do we meet?")
    write_rows(tmp_path / "conversations.jsonl", *[ROWS["conversations"]] * 8)


WITHOUT_REPORT = "no stage writes a report; to get one, add `stage@stages.report: report` to defaults"


@pytest.mark.usefixtures("apart")
def test_a_plan_of_an_evaluation_without_a_report_says_once_how_to_get_one(plan: MakePlan) -> None:
    assert [line for line in screened(plan("~stages.report")) if "report" in line] == [f"note: {WITHOUT_REPORT}"]
    assert not any("no stage writes" in line for line in screened(plan()))
    assert advice(plan("~stages.report", "~stages.evaluate")) == []
    assert of_plan(plan("~stages.report")) == [], "a sweep's trials do not repeat it"


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), []),
        (("stages.dpo.optim.lr=0.01",), []),
        (("name=mine-smoke",), []),
        (("stages.dpo.optim.lr=0.02",), ["stages.dpo.optim.lr is 0.02: above 0.01"]),
        (("stages.ppo.optim.critic_lr=1",), ["stages.ppo.optim.critic_lr is 1: above 0.01"]),
        (("stages.dpo.optim.batch_size=32",), ["stages.dpo.optim.batch_size is 32, but there are only 24 rows"]),
        (("profile=smoke",), ["this is a smoke run"]),
    ],
)
def test_what_is_odd_is_noted(plan: MakePlan, settings: tuple[str, ...], words: list[str]) -> None:
    notes = of_plan(plan(*settings))
    assert [note[: len(word)] for note, word in zip(notes, words, strict=True)] == words


@pytest.mark.usefixtures("apart")
def test_a_processor_without_bfloat16_is_named(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: False)
    monkeypatch.setattr(hardware, "count_devices", lambda: 0)
    (note,) = of_plan(plan())
    assert note.endswith("model.dtype=float32 is faster here")
    assert of_plan(plan("model.dtype=float32")) == []
    monkeypatch.setattr(hardware, "count_devices", lambda: 1)
    assert of_plan(plan()) == []


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("flags\t\t: fpu avx512_bf16\nflags\t\t: fpu avx512_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("nothing", True),
    ],
)
def test_what_a_processor_says_of_bfloat16(cpuinfo: str, expected: bool, tmp_path: Path) -> None:
    assert WITHOUT_PATCH(Path(write(tmp_path / "cpuinfo", cpuinfo))) is expected


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("override", ["profile=smoke", "+profile=smoke", 'profile="smoke"', "++profile=smoke"])
def test_a_smoke_run_says_so_however_it_is_written(plan: MakePlan, override: str) -> None:
    planned = plan(override)
    (note,) = of_plan(planned)
    planned.run_folder.mkdir(parents=True)
    screen = StringIO()
    show_doubts(Console(file=screen, width=400), planned.run_folder, RunRecorder(planned).record)
    assert f"note: {note}" in screen.getvalue()
    assert read_run(planned.run_folder).record.profile == "smoke"


@pytest.mark.usefixtures("apart")
def test_prompts_that_are_learned_and_evaluated_are_named(plan: MakePlan, tmp_path: Path) -> None:
    asks(tmp_path, LONG)
    pairs = tmp_path / "preferences.jsonl"
    longer = {**ROWS["preferences"], "messages": [{**TURN, "content": f"Shorten this. {LONG}"}]}
    write_rows(tmp_path / "longer.jsonl", longer)
    pairs.write_text(pairs.read_text() + (tmp_path / "longer.jsonl").read_text())
    planned = plan()
    (note,) = of_plan(planned)
    assert note == (
        f"1 row that reward, dpo and ppo may learn from resembles prompts of evaluate: {pairs}:25 has "
        f"100% of the eight-word sequences of {tmp_path}/heldout.jsonl:1"
    )
    assert f"note: {note}" in screened(planned, width=400)


@pytest.mark.usefixtures("apart")
def test_a_primary_metric_that_a_stage_optimises_is_named_and_recorded(plan: MakePlan) -> None:
    metrics = "stages.evaluate.metrics=[{name: brevity, source: length, target: 20}, {name: liked, source: reward}]"
    scorers = "stages.ppo.scorers=[{source: reward}, {source: length, target: 20, weight: 0.5}]"
    caution = "evaluate judges by brevity, which ppo optimises (scorers[1]): a better score may only exploit gaps"
    planned = plan(metrics, scorers)
    (note,) = of_plan(planned)
    assert note.startswith(caution)
    planned.run_folder.mkdir(parents=True)
    RunRecorder(planned)
    assert read_run(planned.run_folder).record.cautions == [note]
    liked, only_length = "stages.evaluate.primary=liked", "stages.ppo.scorers=[{source: length, target: 20}]"
    assert of_plan(plan(metrics, liked)) == [note.replace("brevity", "liked").replace("scorers[1]", "scorers[0]")]
    guard = ("stages.ppo.guard.every=1", "stages.ppo.guard.scorer={source: length, target: 20}")
    assert of_plan(plan(metrics, *guard)) == [note.replace("scorers[1]", "guard.scorer")]
    assert of_plan(plan(metrics, scorers.replace("target: 20", "target: 30"))) == []
    assert of_plan(plan(metrics, liked, only_length, "stages.ppo.reward=null")) == []


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ([], "no GPU and no time, so its defaults apply; ask with, for example, launch.backend.gpus=1 launch.backend"),
        (["launch.backend.gpus=2"], "no time, so its defaults apply; ask with, for example, launch.backend.time=4:00:"),
        (["launch.backend.gpus=2", "launch.backend.time='1:00:00'"], ""),
    ],
)
def test_a_plan_says_what_its_jobs_do_not_ask_slurm_for(plan: MakePlan, settings: list[str], asked: str) -> None:
    notes = [line for line in screened(plan("launch/backend=slurm", *settings)) if "ask Slurm" in line]
    assert (len(notes), asked in "".join(notes)) == (bool(asked), True)


@pytest.mark.usefixtures("apart")
def test_a_plan_says_which_models_its_run_would_download(plan: MakePlan) -> None:
    missing = ["stages.evaluate.arms=['hub:org/name@main']", "model.source=hub:org/base@main"]
    notes = [line for line in screened(plan(*missing)) if "download the model" in line]
    assert notes == [f"note: the run will download the model hub:org/{name}@main" for name in ("base", "name")]
    assert not [line for line in screened(plan()) if "download the model" in line]
