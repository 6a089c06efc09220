"""What is known about a run that goes on, or whose processes ended without recording how."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure as TorchFailure

import alignment
from alignment.commands.shared.following import current_run
from alignment.core import terminal
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError, Busy, Preempted, StageError
from alignment.core.locks import held
from alignment.pipeline.execute.run_state import as_it_is, counted
from alignment.pipeline.execute.worker_protocol import raise_for_status
from alignment.pipeline.execute.workers import ProcessState, Watch, refuse_stuck
from alignment.records.run import Attempts
from alignment.records.worker import FAILED, PROGRESS, Heartbeat, Progress, Status, heartbeat_file
from tests.running import RunFolder
from tests.unit.pipeline.conftest import status_of
from tests.unit.pipeline.remote.conftest import sealed

NOW = time.time()
_DIES_HOLDING_THE_LOCK = """\
import os, sys, pathlib
from alignment.core.locks import held
with held(pathlib.Path(sys.argv[1]), wait=False):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def killed(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    subprocess.run([sys.executable, "-c", _DIES_HOLDING_THE_LOCK, run.folder / "lock"], check=False)
    started = datetime.fromtimestamp(time.time() - 340.0, UTC).isoformat()
    run.stage("sft", "done", seconds=41.0)
    run.stage("dpo", "running", started=started, attempts=2, earlier_seconds=60.0)
    run.progress("dpo", "training", 12, 57)
    was_seen(run, run.work("dpo") / PROGRESS)
    return run


def was_seen(run: RunFolder, *files: Path) -> None:
    for file in (run.folder / "run.json", *files):
        os.utime(file, (time.time() - 200.0,) * 2)


def status(run: RunFolder, name: str | None = "mine") -> list[str]:
    return [" ".join(line.split()) for line in status_of(run.output, name).splitlines()]


def test_a_killed_run_says_so_with_its_last_sign_of_life_and_what_to_do(killed: RunFolder) -> None:
    lines = status(killed)
    assert lines[:6] == [
        "mine killed",
        "sft done 41 s sft-5f0e9b1c",
        "reward waiting reward-5f0e9b1c",
        "dpo killed 3 min 20 s in 2 attempts dpo-5f0e9b1c",
        "ppo waiting ppo-5f0e9b1c",
        "dpo: killed in the phase 'training 12/57'",
    ]
    assert lines[6].startswith("mine ended without recording how; the last sign of life was 3 min 2")
    assert lines[7] == "run the same command to continue"
    run = alignment.load_run(killed.folder)
    assert (run.state, run.stages["dpo"].state, run.stages["reward"].state) == ("killed", "killed", "waiting")
    assert run.stages["dpo"].progress is not None
    assert run.record.stages["dpo"].state == "running", "what was recorded"
    (killed.output / "runs/broken").mkdir()
    (killed.output / "runs/broken/run.json").write_text("[]")  # as a newer version may write it
    lines = status(killed, None)
    assert [line.split()[:2] for line in lines] == [["broken", "unreadable"], ["mine", "killed"]]
    assert str(killed.output / "runs/broken/run.json") in lines[0]


def test_a_process_that_outlives_its_driver_or_its_launcher_is_not_called_killed(killed: RunFolder) -> None:
    with held(killed.work("dpo") / "lock", wait=False):
        lines = status(killed)
    assert (lines[0], lines[3].startswith("dpo running "), lines[5]) == ("mine killed", True, "dpo: training 12/57")
    assert "another process is still working on dpo" in lines[6]
    assert "--wait" in lines[7]
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
    assert (lines[0], lines[3]) == ("mine killed", "dpo done 1 min 32 s in 2 attempts dpo-5f0e9b1c")
    assert not [line for line in lines if "killed in" in line]
    assert "the last sign of life was 0 s ago" in lines[5]
    assert alignment.load_run(killed.folder).stages["dpo"].state == "done"
    (artifact / "metrics.jsonl").write_text("")
    assert as_it_is(killed.folder, killed.record).stages["dpo"].state == "killed", "a plan would not reuse it"


def test_a_run_of_another_machine_is_neither_called_killed_nor_taken_for_the_current_one(killed: RunFolder) -> None:
    (killed.folder / "lock").write_text("4711 node7")
    lines = status(killed)
    assert (lines[0], lines[3].startswith("dpo running "), lines[5]) == ("mine unknown", True, "dpo: training 12/57")
    assert "(it was started on node7); the last sign of life was 3 min 2" in lines[6]
    assert lines[7] == "if it has ended, run the same command to continue"
    later = RunFolder(killed.output, "later", state="preempted", started="2027-01-01T00:00:00+00:00")
    assert current_run(killed.output) == later.folder
    assert "it was stopped; run the same command to continue" in status(later, "later")


def fails(error: BaseException) -> Callable[[Path], None]:
    def attempt(work: Path) -> None:
        with pytest.raises(type(error)), counted(work):
            raise error

    return attempt


def beat(work: Path, rank: int = 0, *, at: float = 5000.0, pid: int = 1) -> Path:
    file = heartbeat_file(work, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    Heartbeat(pid=pid, phase="training", time=at, since=at - 0.5, waits=False, location="x").write(file)
    os.utime(file, (at, at))
    return file


def test_attempts_that_ended_are_added_up_and_a_call_that_is_refused_is_none(tmp_path: Path) -> None:
    Attempts(number=2, earlier_seconds=500.0).write(tmp_path)
    fails(StageError("no"))(tmp_path)
    before = Attempts.read(tmp_path)
    fails(Busy("in use"))(tmp_path)
    assert Attempts.read(tmp_path) == before
    with counted(tmp_path) as attempt:
        assert (attempt.number, attempt.started >= NOW, 500.0 <= attempt.earlier_seconds < 510.0) == (4, True, True)
    (tmp_path / "attempts.json").write_text('{"number": "two"}')
    with counted(tmp_path) as attempt:
        assert (attempt.number, attempt.earlier_seconds) == (1, 0.0), "a file that cannot be read ends no stage"


def test_attempts_that_store_nothing_are_counted(tmp_path: Path) -> None:
    for expected in (1, 2):
        fails(Preempted("stopped"))(tmp_path)
        assert Attempts.read(tmp_path).without_progress == expected
    with suppress(Preempted), counted(tmp_path):
        sealed(tmp_path, 20)
        raise Preempted("stopped")
    assert Attempts.read(tmp_path).without_progress == 0
    fails(Preempted("stopped"))(tmp_path)
    assert Attempts.read(tmp_path).without_progress == 1, "what an earlier attempt stored is no progress of this one"
    fails(StageError("no"))(tmp_path)
    assert Attempts.read(tmp_path).without_progress == 0, "it did not lack time"


@pytest.mark.parametrize(
    ("age", "beats", "seconds"),
    [(500.0, (130.0, 100.0, 110.0), 420.0), (500.0, (), 70.0), (0.0, (10.0,), 20.0)],
    ids=["the last of all", "its progress", "of an attempt before"],
)
def test_a_killed_attempt_counts_until_its_last_sign(
    tmp_path: Path, age: float, beats: tuple[float, ...], seconds: float
) -> None:
    Attempts(number=1, earlier_seconds=20.0, started=NOW - age).write(tmp_path)
    Progress(phase="training").write(tmp_path)
    os.utime(tmp_path / PROGRESS, (NOW - 450.0, NOW - 450.0))
    for rank, before in enumerate(beats):
        beat(tmp_path, rank, at=NOW - before)
    with counted(tmp_path) as attempt:
        assert (attempt.number, attempt.earlier_seconds) == (2, pytest.approx(seconds, abs=0.01))


def sign(rank: int, *, silent: float = 0.0, **changes: Any) -> ProcessState:
    last = Heartbeat(pid=1, phase="training", time=5000.0, since=4999.5, waits=False, location=f"here{rank}")
    return ProcessState(rank=rank, last=replace(last, **changes), silent=silent)


def judge(*signs: ProcessState, processes: int) -> None:
    refuse_stuck(signs, processes=processes, limit=60, stage="sft")


STUCK = {"since": 4939.0}
WAITING = {"since": 4939.0, "waits": True}


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ([sign(0, **WAITING), sign(1, **STUCK)], "process 1 of 2 has been stuck for 60 seconds: training, here1"),
        ([sign(0, **STUCK), sign(1, silent=61.0)], "process 1 of 2 has not run for 60 seconds: training, here1"),
        ([sign(0, **WAITING)], "process 0 of 1 has been stuck for 60 seconds: training, here0"),
        ([sign(0, **WAITING), sign(1, **WAITING)], "process 0: training, here0"),
    ],
    ids=["others wait", "stopped", "alone with its GPU", "all wait"],
)
def test_the_process_that_others_wait_for_is_named(signs: list[ProcessState], expected: str) -> None:
    with pytest.raises(StageError) as caught:
        judge(*signs, processes=len(signs))
    assert (caught.value.where, expected in str(caught.value)) == ("stage sft", True)
    judge(*signs, processes=len(signs) + 1)  # one has not started
    judge(*signs, sign(len(signs)), processes=len(signs) + 1)  # one is at work


def test_a_clock_that_is_set_makes_no_process_look_stuck(tmp_path: Path) -> None:
    """A worker's own clock and the reader's have nothing in common; only what changes counts."""
    now = 7.0
    watch = Watch(tmp_path, clock=lambda: now)
    beat(tmp_path)
    assert [state.idle for state in watch.look()] == [0.5]
    now = 70.0
    beat(tmp_path, at=1400.0)
    judge(*watch.look(), processes=1)
    now = 131.0
    with pytest.raises(StageError, match="process 0 of 1 has not run"):
        judge(*watch.look(), processes=1)
    beat(tmp_path, at=1400.0, pid=2)
    assert [state.silent for state in watch.look()] == [0.0], "another process of the same rank"


def report(*failures: tuple[int, int, int]) -> str:
    torchs = {}
    for rank, code, second in failures:
        torchs[rank] = TorchFailure(local_rank=rank, pid=4000 + rank, exitcode=code, error_file="<N/A>")
        torchs[rank].timestamp = 1_790_000_000 + second
    return f"step 3\n{ChildFailedError('alignment.worker', torchs)}\n"


LOST = "RuntimeError: Connection reset by peer"
BUG = "KeyError: 'x'"
FIRST = (0, 1, 0)
TORCHRUNS_OWN = (2, -9, 31)


@pytest.mark.parametrize(
    ("error", "failures", "code", "words"),
    [
        # The others lost their connection, and torchrun saw all at once, or within two seconds.
        (LOST, [FIRST, (1, -9, 0), TORCHRUNS_OWN], 5, "process 1 ended by signal 9 (often"),
        (LOST, [FIRST, (1, -9, 1)], 5, "process 1 ended by signal 9 (often"),
        (LOST, [FIRST, (1, -26, 0), TORCHRUNS_OWN], 5, "process 1 ended by SIGVTALRM (a chat template"),
        ("", [(0, -6, 0), (1, -9, 31)], 5, "process 0 ended by signal 6"),
        # torchrun itself ends those that remain, and kills what does not end in half a minute.
        (BUG, [FIRST, (1, -15, 0), TORCHRUNS_OWN], 1, BUG),
        (BUG, [FIRST, (1, -9, 30)], 1, BUG),
        # NCCL aborts a process that lost its connection.
        ("", [(0, -6, 1), (1, 3, 0)], 5, "process 1 ended with exit code 3"),
    ],
)
def test_a_killed_process_is_named_but_neither_a_lost_connection_nor_what_torchrun_ended(
    tmp_path: Path, error: str, failures: list[tuple[int, int, int]], code: int, words: str
) -> None:
    if error:
        Status(state=FAILED, exit_code=1, error=error).write(tmp_path)
    (tmp_path / "log.txt").write_text(report(*failures))
    with pytest.raises(AlignmentError) as caught:
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])
    assert (caught.value.exit_code, words in str(caught.value)) == (code, True)


def test_a_report_is_read_out_of_a_shortened_log_unless_it_is_of_an_earlier_attempt(tmp_path: Path) -> None:
    Status(state=FAILED, exit_code=1, error=BUG).write(tmp_path)
    log = tmp_path / "log.txt"
    log.write_text("step\n" * (terminal.LIMIT // 10))
    terminal.begin_attempt(log, "attempt 1 at sft-1")
    log.write_text(log.read_text() + "step\n" * (terminal.LIMIT // 5) + report(FIRST, (1, -9, 0)))
    terminal.shorten(log)
    with pytest.raises(StageError, match="process 1 ended by signal 9"):
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])
    terminal.begin_attempt(log, "attempt 2 at sft-1")
    log.write_text(log.read_text() + report((0, 1, 900), (1, -15, 900)))
    with pytest.raises(AlignmentError, match=BUG):
        raise_for_status(tmp_path, code=1, stage="sft", kinds=["sft"])
