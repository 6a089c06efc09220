"""What is known about a run whose driver ended without recording how."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import alignment
from alignment.commands.shared.named_runs import current_run
from alignment.commands.status import show_status
from alignment.core.artifacts import Manifest, publish
from alignment.core.locks import held
from alignment.pipeline.execute import run_state
from alignment.pipeline.execute.run_state import as_it_is, explanation
from alignment.records.run import StageEntry
from alignment.records.worker import PROGRESS
from tests.running import RunFolder

_DIES_HOLDING_THE_LOCK = """\
import os, sys, pathlib
from alignment.core.locks import held
with held(pathlib.Path(sys.argv[1]), wait=False):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def killed(tmp_path: Path) -> RunFolder:
    """A run whose driver was killed 200 s ago while it trained dpo, 140 s after the start of the stage."""
    run = RunFolder(tmp_path)
    subprocess.run([sys.executable, "-c", _DIES_HOLDING_THE_LOCK, run.folder / "lock"], check=False)
    started = datetime.fromtimestamp(time.time() - 340.0, UTC).isoformat()
    run.stage("sft", "done", seconds=41.0)
    run.stage("dpo", "running", started=started, attempts=2, earlier_seconds=60.0)
    run.progress("dpo", "training", 12, 57)
    seen = time.time() - 200.0
    for file in (run.folder / "run.json", run.work("dpo") / PROGRESS):
        os.utime(file, (seen, seen))
    return run


def status(run: RunFolder, name: str | None = "mine") -> list[str]:
    """The lines that ``align status`` prints, with single spaces."""
    screen = StringIO()
    show_status(Console(file=screen, width=160), run.output, name)
    return [" ".join(line.split()) for line in screen.getvalue().splitlines()]


def test_a_killed_run_says_so_with_its_last_sign_of_life_and_what_to_do(killed: RunFolder) -> None:
    lines = status(killed)
    assert lines[:5] == [
        "mine killed",
        "sft done 41 s sft-5f0e9b1c",
        "reward waiting reward-5f0e9b1c",
        "dpo killed 3 min 20 s in 2 attempts dpo-5f0e9b1c",
        "ppo waiting ppo-5f0e9b1c",
    ]
    assert lines[5] == "dpo: killed in the phase 'training 12/57'"
    assert lines[6].startswith("mine ended without recording how; the last sign of life was 3 min 2")
    assert lines[7] == "run the same command to continue"
    assert status(killed, None)[0].startswith("mine killed ")


def test_a_run_that_was_moved_shows_its_progress_and_its_results(killed: RunFolder, tmp_path: Path) -> None:
    judged = killed.output / "artifacts/judge-5f0e9b1c"
    judged.mkdir()
    (judged / "evaluation.json").write_text('{"arms": [{"name": "stage:sft", "words": {"mean": 7.5}}]}')
    (judged / "samples.jsonl").touch()
    entry = StageEntry(kind="evaluate", state="done", artifact=str(judged))
    seen = (killed.folder / "run.json").stat().st_mtime
    killed.run(stages={**killed.record.stages, "judge": entry})
    os.utime(killed.folder / "run.json", (seen, seen))
    before = status(killed)
    killed.output = tmp_path / "moved"
    killed.output.mkdir()
    for part in ("runs", "artifacts"):
        (tmp_path / part).rename(killed.output / part)
    assert [line for line in before if line.startswith("sft 7.5")]
    assert status(killed) == before


@pytest.mark.parametrize("state", ["interrupted", "preempted"])
def test_a_run_that_was_asked_to_stop_says_how_it_goes_on(tmp_path: Path, state: str) -> None:
    run = RunFolder(tmp_path, state=state)
    assert "it was stopped; run the same command to continue" in status(run)
    run.run(state="done")
    assert "it was stopped; run the same command to continue" not in status(run)


def test_a_process_that_outlives_its_driver_is_named(killed: RunFolder) -> None:
    with held(killed.work("dpo") / "lock", wait=False):
        lines = status(killed)
    assert lines[0] == "mine killed"
    assert lines[3].startswith("dpo running ")
    assert lines[5:8] == [
        "dpo: training 12/57",
        "mine ended without recording how, but another process is still working on dpo",
        "run the same command with --wait to continue after that",
    ]


def test_a_worker_that_outlives_its_launcher_is_not_called_killed(killed: RunFolder) -> None:
    with held(killed.work("dpo") / "worker.lock", wait=False):
        assert as_it_is(killed.folder, killed.record).stages["dpo"].state == "running"
    assert as_it_is(killed.folder, killed.record).stages["dpo"].state == "killed"


def test_a_stage_that_outlived_its_driver_and_stored_its_result_is_done(killed: RunFolder) -> None:
    content = killed.work("dpo") / "content"
    (content / "metrics.jsonl").write_text('{"step": 57}\n')
    artifact = Path(killed.record.stages["dpo"].artifact)
    manifest = Manifest(stage="dpo", kind="policy", fingerprint="5f0e", identity={}, usage={"seconds": 92.0})
    publish(content, artifact, manifest)
    lines = status(killed)
    assert lines[0] == "mine killed"
    assert lines[3] == "dpo done 1 min 32 s in 2 attempts dpo-5f0e9b1c"
    assert not [line for line in lines if "killed in" in line]
    assert "the last sign of life was 0 s ago" in lines[5]
    assert alignment.load_run(killed.folder).stages["dpo"].state == "done"
    (artifact / "metrics.jsonl").write_text("")
    assert as_it_is(killed.folder, killed.record).stages["dpo"].state == "killed", "a plan would not reuse it"


def test_a_run_of_another_machine_is_not_called_killed(killed: RunFolder) -> None:
    (killed.folder / "lock").write_text("4711 node7")
    lines = status(killed)
    assert lines[0] == "mine unknown"
    assert lines[3].startswith("dpo running ")
    assert lines[5] == "dpo: training 12/57"
    assert lines[6].startswith(
        "mine may still be running, which cannot be seen from here (it was started on node7); the last sign of life "
        "was 3 min 2"
    )
    assert lines[7] == "if it has ended, run the same command to continue"


def test_a_run_that_cannot_be_seen_is_not_taken_for_the_current_one(killed: RunFolder) -> None:
    (killed.folder / "lock").write_text("4711 node7")
    later = RunFolder(killed.output, "later", state="done", started="2027-01-01T00:00:00+00:00")
    assert current_run(killed.output) == later.folder


def test_a_run_that_ended_meanwhile_is_not_called_killed(killed: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = killed.record

    def ends(_: Path) -> bool:
        killed.run(state="failed")
        return False

    monkeypatch.setattr(run_state, "is_held", ends)
    assert as_it_is(killed.folder, before).state == "failed"
    assert explanation(killed.folder, as_it_is(killed.folder, before)) == []


def test_a_killed_stage_is_read_as_killed_from_python(killed: RunFolder) -> None:
    run = alignment.load_run(killed.folder)
    assert (run.state, run.stages["dpo"].state, run.stages["reward"].state) == ("killed", "killed", "waiting")
    assert run.stages["dpo"].progress is not None
    assert run.record.stages["dpo"].state == "running", "what was recorded"


def test_a_run_that_cannot_be_read_hides_no_other_from_the_list(killed: RunFolder) -> None:
    """As one that a newer version wrote."""
    (killed.output / "runs/broken").mkdir()
    (killed.output / "runs/broken/run.json").write_text("[]")
    lines = status(killed, None)
    assert [line.split()[:2] for line in lines] == [["broken", "unreadable"], [killed.folder.name, "killed"]]
    assert str(killed.output / "runs/broken/run.json") in lines[0]
