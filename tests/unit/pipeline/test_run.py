"""Plans carried out with real processes and real files; only the training is left out."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
import yaml
from rich.console import Console

from alignment.api.loaded_run import load_run
from alignment.commands.status import show_status
from alignment.config.launch import LaunchConfig
from alignment.core.errors import (
    AlignmentError,
    ArtifactError,
    Busy,
    ConfigError,
    DiskError,
    NonFiniteError,
    StageError,
)
from alignment.core.locks import held
from alignment.core.streams import Unfailing
from alignment.pipeline.backends import machines, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.slurm_job_file import HERE
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.execute.run import run, run_trial
from alignment.pipeline.execute.run_state import as_it_is, explanation
from alignment.pipeline.execute.signals import Terminated, termination_raises
from alignment.pipeline.execute.worker_protocol import commit_of_checkout
from alignment.records.attempts import Attempts
from alignment.records.run import RunRecord
from alignment.stages.stage_file import read_spec
from tests.patience import wait_until

ROOT = Path(__file__).parents[3]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
STAGES = ["sft", "reward", "dpo", "ppo", "evaluate", "report"]


def fake(launch: LaunchConfig, stage_file: Path) -> Command:
    """Starts the worker of these tests."""
    argv = (sys.executable, str(Path(__file__).with_name("worker.py")), str(stage_file))
    return Command(argv=argv, environment={"PYTHONPATH": str(ROOT)})


class Align:
    """``align run`` and ``align status`` in a folder of their own."""

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides
        self.output = Path(overrides[0].removeprefix("output="))
        self.run_folder = self.output / "runs/quickstart"

    def __call__(self, *more: str, only: str | None = None, verified: bool = False) -> tuple[int, str]:
        """The exit code and what was printed."""
        screen = StringIO()
        console = Console(file=screen, width=120)
        settings = [*self.overrides, *more]
        code = run("quickstart", settings, console=console, only=only, verified=verified, command_for=fake)
        return code, screen.getvalue()

    def status(self, name: str | None = "quickstart") -> str:
        """What ``align status`` prints."""
        screen = StringIO()
        show_status(Console(file=screen, width=120), self.output, name)
        return screen.getvalue()

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        content: dict[str, Any] = json.loads((self.run_folder / "run.json").read_text())
        return content

    def states(self) -> dict[str, str]:
        """Stage → state."""
        return {name: stage["state"] for name, stage in self.record()["stages"].items()}


@pytest.fixture
def align(overrides: list[str]) -> Align:
    """The driver on a tiny run."""
    return Align(overrides)


def test_a_run_makes_every_stage_once_and_a_second_one_reuses_them(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = align()
    assert code == 0
    assert align.states() == dict.fromkeys(STAGES, "done")
    assert align.record()["state"] == "done"
    assert not list((align.output / "artifacts").glob("*.work"))
    assert (align.run_folder / "report.html").stat().st_size > 1000
    assert "dpo against sft: +0.080 (+0.020 to +0.140), better" in printed
    assert "base against sft: -0.010 (-0.050 to +0.030), no real difference" in printed
    assert f"report: {align.run_folder / 'report.html'}" in printed
    assert "base+prompt" in printed

    def starts(*_: Any, **__: Any) -> int:
        raise AssertionError("a reused stage starts nothing")

    monkeypatch.setattr(processes, "execute", starts)
    code, again = align()
    assert code == 0
    assert align.states() == dict.fromkeys(STAGES, "reused")
    assert "better" in again
    assert all(stage["seconds"] is not None for stage in align.record()["stages"].values())
    assert "reused" in align.status()


def test_a_run_without_a_report_says_so_once_and_a_trial_of_a_sweep_does_not(align: Align) -> None:
    without = "~stages.report"
    _, printed = align(without)
    assert printed.count("no stage writes a report") == 1
    assert "no stage writes a report" not in align(without, only="sft")[1]
    screen = StringIO()
    assert run_trial("quickstart", [*align.overrides, without], console=Console(file=screen), wait=True) == 0
    assert "evaluate: reused" in screen.getvalue()
    assert "no stage writes a report" not in screen.getvalue()


def test_a_changed_setting_re_runs_its_stage_and_what_follows(align: Align) -> None:
    align()
    align("stages.dpo.beta=0.3", "launch.num_processes=1")
    expected = {
        "sft": "reused",
        "reward": "reused",
        "dpo": "done",
        "ppo": "reused",
        "evaluate": "done",
        "report": "done",
    }
    assert align.states() == expected
    assert align.record()["stages"]["dpo"]["reason"].startswith("beta 0.1 → 0.3 (nearest: dpo-")


def test_a_damaged_result_is_moved_away_and_made_again(align: Align) -> None:
    align()
    artifact = Path(align.record()["stages"]["reward"]["artifact"])
    made = {path.name: path.read_bytes() for path in artifact.iterdir()}
    damaged = made["metrics.jsonl"][:-2] + b" \n"
    (artifact / "metrics.jsonl").write_bytes(damaged)
    align()
    assert align.states() == dict.fromkeys(STAGES, "reused"), "its size is right"
    _, printed = align(verified=True)
    assert align.states() == dict.fromkeys(STAGES, "reused") | {"reward": "done"}
    assert (artifact / "metrics.jsonl").read_bytes() == made["metrics.jsonl"]
    aside = artifact.with_name(f"{artifact.name}.damaged")
    assert (aside / "metrics.jsonl").read_bytes() == damaged
    assert f"reward: {artifact.name} is damaged, and was moved to {aside}" in printed
    (artifact / "metrics.jsonl").unlink()
    align()
    assert align.states()["reward"] == "done"
    assert not (aside / "metrics.jsonl").exists(), "the folder of the last damage replaces the one before"


def test_the_worker_is_told_everything_in_plain_values(align: Align) -> None:
    align()
    spec = yaml.safe_load((align.run_folder / "evaluate/stage.yaml").read_text())
    assert spec["config"]["kind"] == "evaluate"
    assert spec["inputs"]["reward"]["ref"] == "stage:reward"
    assert list(spec["arms"]) == ["base", "base+prompt", "stage:sft", "stage:dpo", "stage:ppo"]
    assert spec["arms"]["base+prompt"] == {"ref": "base+prompt", "path": None}
    assert spec["arms"]["stage:dpo"]["path"] == align.record()["stages"]["dpo"]["artifact"]
    assert Path(spec["base_path"]).is_absolute()
    assert (align.run_folder / "dpo/log.txt").read_text().splitlines()[1:] == ["working on dpo"]


def test_what_a_worker_says_of_its_failure_reaches_the_user(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_FAULT", "dpo:fail")
    with pytest.raises(NonFiniteError) as caught:
        align()
    log = align.run_folder / "dpo/log.txt"
    assert str(caught.value) == (f"stage dpo: the loss is NaN at step 3\n  → lower the learning rate\n  log: {log}")
    assert caught.value.exit_code == 6
    assert align.states() | {"sft": "done", "dpo": "failed", "ppo": "waiting"} == align.states()
    assert align.record()["state"] == "failed"
    assert f"log: {log}" in align.status()
    monkeypatch.delenv("WORKER_FAULT")
    align()
    assert align.states()["sft"] == "reused"
    assert align.states()["dpo"] == "done"


def test_what_a_stage_noted_on_its_way_reaches_the_user_once(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_FAULT", "dpo:note")
    _, printed = align()
    assert printed.count("dpo: TensorBoard failed") == 1
    assert align.states()["dpo"] == "done"


@pytest.mark.parametrize(
    ("fault", "error", "code", "words"),
    [
        (
            "sft:crash",
            StageError,
            5,
            ["by signal 9", "memory", "in the phase 'trying the longest batch'", "| working on sft"],
        ),
        ("sft:silence", StageError, 5, ["with exit code 1, or was killed together with the process that started it"]),
        ("sft:template", StageError, 5, ["by SIGVTALRM", "a chat template did not finish"]),
        ("sft:disk", DiskError, 12, ["no space left on the device; 4 kB are free", "log.txt"]),
        ("sft:torn", ArtifactError, 7, ["status.json: unreadable: state: 3 is not text", "log.txt"]),
        ("sft:bug", AlignmentError, 1, ["KeyError: 'x'", "a bug in this project", "| working on sft"]),
    ],
)
def test_a_worker_that_ends_badly_is_shown_with_its_last_words(
    align: Align,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    error: type[AlignmentError],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.setenv("WORKER_FAULT", fault)
    with pytest.raises(error) as caught:
        align()
    assert type(caught.value).exit_code == code
    assert all(word in str(caught.value) for word in words)


def test_a_bug_of_a_kind_from_another_package_is_looked_for_there(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:bug")
    monkeypatch.setattr(worker_protocol, "origin_of", {"sft": "their-stage"}.__getitem__)
    with pytest.raises(AlignmentError, match="KeyError: 'x'") as caught:
        align()
    assert caught.value.exit_code == 1
    assert caught.value.remedy.startswith("look for the bug in their-stage, which adds this kind of stage; the log is ")


def test_a_stage_that_could_not_write_how_it_ended_is_told_by_the_full_disk(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:crash")
    monkeypatch.setattr("alignment.pipeline.execute.worker_protocol.is_full", lambda _: True)
    with pytest.raises(DiskError, match=r"no space left on the device; .* free; it could not record") as caught:
        align()
    assert "free space and run again" in caught.value.remedy


def test_a_record_that_cannot_be_written_does_not_hide_why_the_run_failed(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("WORKER_FAULT", "sft:fail")
    monkeypatch.setattr(worker_protocol, "notes", lambda _: monkeypatch.setattr(RunRecorder, "_save", full) or [])
    with pytest.raises(NonFiniteError, match="the loss is NaN"):
        align()


def test_a_stage_that_failed_before_is_judged_by_what_it_does_now(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:fail")
    with pytest.raises(NonFiniteError):
        align()
    monkeypatch.setenv("WORKER_FAULT", "sft:crash")
    with pytest.raises(StageError, match="ended by signal 9") as caught:
        align()
    assert type(caught.value) is StageError


def test_a_stage_that_says_it_is_done_and_left_nothing_is_a_fault(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:lie")
    with pytest.raises(ArtifactError, match="reported success, but its result is missing"):
        align()
    assert align.states()["sft"] == "failed"


def test_a_stage_holds_its_lock_itself(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver may be killed while it works on, and nobody else may begin then."""
    held_open: list[bool] = []
    graces: list[float] = []
    execute = processes.execute

    def noted(command: Command, *, log: Path, keep_open: Sequence[int], **options: Any) -> int:
        work = read_spec(log.with_name("stage.yaml")).work
        held_open.append([os.fstat(number).st_ino for number in keep_open] == [(work / "lock").stat().st_ino])
        graces.append(options["grace_seconds"])
        return execute(command, log=log, keep_open=keep_open, **options)

    monkeypatch.setattr(processes, "execute", noted)
    align("launch.grace_seconds=7")
    assert held_open == [True] * 5
    assert graces == [7] * 5


def test_a_stage_that_was_preempted_ends_the_run_with_75(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_FAULT", "reward:preempt")
    code, printed = align()
    assert code == 75
    assert "reward: stopped on request" in printed, "the worker knows whether it could save"
    assert "stopped; run the same command to continue from here" in printed
    assert align.record()["state"] == "preempted"
    assert align.states()["reward"] == "waiting"


def test_a_job_that_stores_nothing_before_it_is_stopped_is_not_queued_again_forever(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 75 lets its script queue it again; a benchmark, for example, would begin anew each time."""
    monkeypatch.setenv("WORKER_FAULT", "sft:preempt")
    assert [align("launch/backend=slurm", HERE, only="sft")[0] for _ in range(2)] == [75, 75]
    with pytest.raises(StageError, match="3 attempts in turn were stopped before it had stored anything") as caught:
        align("launch/backend=slurm", HERE, only="sft")
    assert caught.value.remedy == "give its job more time with launch.backend.time"
    assert [align(only="sft")[0] for _ in range(4)] == [75] * 4, "a person who starts a run again is not refused"
    monkeypatch.setenv("WORKER_FAULT", "sft:part")
    assert [align("launch/backend=slurm", HERE, only="sft")[0] for _ in range(4)] == [75] * 4, "each stored something"


def test_the_time_of_a_stage_that_is_continued_is_that_of_all_attempts(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:preempt")
    align()
    stopped = align.record()["stages"]["sft"]
    work = Path(f"{stopped['artifact']}.work")
    assert Attempts.read(work).earlier_seconds == pytest.approx(stopped["seconds"], abs=0.5)
    Attempts(number=1, earlier_seconds=3600.0).write(work)  # as if it had taken an hour

    monkeypatch.delenv("WORKER_FAULT")
    _, printed = align()
    assert "sft: done  1 h 00 min in 2 attempts  sft-" in printed
    entry = align.record()["stages"]["sft"]
    assert (entry["attempts"], entry["earlier_seconds"]) == (2, 3600.0)
    assert 3600.0 < entry["seconds"] < 3700.0
    assert "1 h 00 min in 2 attempts" in align.status()
    assert "1\u202fh 00\u202fmin in 2 attempts" in (align.run_folder / "report.html").read_text()
    assert align.record()["stages"]["dpo"]["attempts"] == 1


def test_the_log_of_a_stage_says_where_each_attempt_begins(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:preempt")
    align()
    log = align.run_folder / "sft/log.txt"
    log.write_text(f"{log.read_text()}killed in half a li")
    monkeypatch.delenv("WORKER_FAULT")
    align(only="sft")
    artifact = Path(align.record()["stages"]["sft"]["artifact"]).name
    lines = [TIME.sub("TIME", line) for line in log.read_text().splitlines()]
    assert lines == [
        f"=== TIME  attempt 1 at {artifact} ===",
        "working on sft",
        "killed in half a li",
        f"=== TIME  attempt 2 at {artifact} ===",
        "working on sft",
    ]


@pytest.mark.parametrize(
    ("number", "code", "state", "again"),
    [
        (signal.SIGINT, 130, "interrupted", True),
        (signal.SIGTERM, 75, "preempted", False),
        (signal.SIGUSR1, 75, "preempted", False),
        (signal.SIGHUP, 75, "preempted", False),
    ],
)
def test_a_signal_to_the_driver_is_acknowledged_and_lets_the_stage_save_first(
    align: Align, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, state: str, *, again: bool
) -> None:
    # A shell starts its background jobs with SIGINT ignored, and Python then leaves it so.
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setenv("WORKER_FAULT", "sft:hang")
    over = threading.Event()
    sender = _when((align.run_folder / "sft/hanging").exists, lambda: os.kill(os.getpid(), number), over=over)
    try:
        ended, printed = align()
    finally:
        over.set()
        sender.join()
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended == code
    acknowledged, stopped = (
        printed.index("stopping: the stage will finish its step, save"),
        printed.index("sft: stopped"),
    )
    assert acknowledged < stopped
    assert ("press Ctrl-C again" in printed) is again
    assert json.loads((align.run_folder / "sft/status.json").read_text())["state"] == "preempted"
    assert align.record()["state"] == state


def _when(ready: Callable[[], bool], action: Callable[[], None], *, over: threading.Event) -> threading.Thread:
    """A thread that waits until something is ready, and does nothing once all is over."""

    def wait() -> None:
        while not ready():
            if over.wait(0.05):
                return
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_what_a_process_left_that_was_killed_right_after_its_result_was_there_is_cleared(align: Align) -> None:
    align()
    artifact = Path(align.record()["stages"]["sft"]["artifact"])
    left = [artifact.with_name(f"{artifact.name}.work"), align.run_folder / ".run.json.0a1b.tmp"]
    (left[0] / "checkpoints/checkpoint-4").mkdir(parents=True)
    left[1].touch()
    os.utime(left[1], (1, 1))
    with held(left[0] / "worker.lock", wait=False):
        align()
        assert left[0].exists(), "its process is still about"
    align()
    assert not any(path.exists() for path in left)


def test_a_run_leaves_alone_what_is_being_written_into_its_folder(align: Align) -> None:
    """A job begins while the command that submits the chain still writes jobs.json."""
    being_written = align.run_folder / ".jobs.json.0a1b.tmp"
    align.run_folder.mkdir(parents=True)
    being_written.touch()
    align()
    assert being_written.exists()


def test_half_written_files_of_an_attempt_that_was_killed_are_cleared(align: Align) -> None:
    align()
    artifact = Path(align.record()["stages"]["sft"]["artifact"])
    artifact.rename(artifact.with_name("gone"))
    work = artifact.with_name(f"{artifact.name}.work")
    left = [
        work / ".progress.json.0a.tmp",
        work / "content/.manifest.json.0b.tmp",
        work / "content/model/.weights.0c.tmp",
        align.run_folder / "sft/.status.json.0d.tmp",
    ]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    align()
    assert not list(align.output.rglob("*.tmp"))
    assert not any(".tmp" in name for name in json.loads((artifact / "manifest.json").read_text())["files"])


class _Gone(StringIO):
    """What is left of a terminal that was closed, or of a pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_run_whose_terminal_is_gone_goes_on(align: Align) -> None:
    console = Console(file=cast("TextIO", Unfailing(_Gone())), force_terminal=True, width=120)
    assert run("quickstart", align.overrides, console=console, only="sft", command_for=fake) == 0
    assert align.states()["sft"] == "done"


def test_a_second_hangup_does_not_cut_short_what_the_first_began() -> None:
    """A shell hands on the SIGHUP that its terminal has sent to everyone already."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(Terminated), termination_raises():
            signal.raise_signal(signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with termination_raises():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def asked_twice(first: signal.Signals, save: Callable[[], None]) -> None:
    """What saves when it is asked to stop, and is asked again while it does."""
    with termination_raises():
        try:
            signal.raise_signal(first)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            save()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_request_does_not_cut_short_what_the_first_began(first: signal.Signals) -> None:
    """A scheduler sends SIGUSR1 and then SIGTERM, and a sweep that is stopped asks trials that were asked already."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        with pytest.raises(Terminated):
            asked_twice(first, lambda: arrived.append(0))
        assert arrived == [0], "what the first began came to its end"
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrived == [0, signal.SIGTERM], "the handler is back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_batch_that_cannot_be_split_is_refused_before_anything_starts(align: Align) -> None:
    with pytest.raises(ConfigError) as caught:
        align("launch.num_processes=3", "stages.ppo.optim.batch_size=36", "stages.reward.optim.batch_size=12")
    assert "stages.sft.optim.batch_size: 8 is not divisible by 3 processes" in str(caught.value)
    assert "stages.dpo.optim.batch_size" in str(caught.value)
    assert "stages.ppo" not in str(caught.value)
    assert not (align.run_folder / "sft").exists()


def test_an_output_that_cannot_be_written_says_so(align: Align) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        align("output=/proc/nowhere")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_without_room_for_a_folder_is_no_fault_of_the_settings(
    align: Align, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A sweep records faults of settings for good."""
    make_folder = os.mkdir

    def mkdir(path: Path, mode: int = 0o777) -> None:
        if Path(path).is_relative_to(align.run_folder):
            raise OSError(number, os.strerror(number), str(path))
        make_folder(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(DiskError) as caught:
        align()
    assert caught.value.where == str(align.run_folder)


BUSY_REMEDY = f"wait for it with --wait, or stop it; `ps -fp {os.getpid()}` shows it, `kill {os.getpid()}` stops it"


def test_a_run_in_use_is_left_alone(align: Align) -> None:
    with held(align.run_folder / "lock", wait=False), pytest.raises(Busy, match=f"process {os.getpid()}") as caught:
        align()
    assert caught.value.remedy == BUSY_REMEDY
    assert not (align.run_folder / "run.json").exists()


def test_a_result_that_another_run_works_on_is_left_alone(align: Align) -> None:
    align()
    artifact = Path(align.record()["stages"]["sft"]["artifact"])
    artifact.rename(artifact.with_name("gone"))
    with held(artifact.with_name(f"{artifact.name}.work") / "lock", wait=False):
        with pytest.raises(Busy) as caught:
            align()
        record = RunRecord.read(align.run_folder)
        assert explanation(align.run_folder, as_it_is(align.run_folder, record)) == [
            "another process is working on sft",
            "run the same command with --wait to continue after that",
        ]
    assert caught.value.remedy == BUSY_REMEDY
    left = as_it_is(align.run_folder, record)
    assert (left.state, left.stages["sft"].state) == ("waiting", "waiting"), "nobody killed this run"
    assert explanation(align.run_folder, left) == []


def run_that_waits(align: Align, lock: Path, announcement: str, *, then: Callable[[], object] = lambda: None) -> str:
    """What a run prints that waits for the lock; its holder does ``then`` when that is announced, and lets go."""
    screen = StringIO()
    with ExitStack() as other:
        other.enter_context(held(lock, wait=False))

        def finish() -> None:
            wait_until(lambda: announcement in screen.getvalue())
            then()
            other.close()

        thread = threading.Thread(target=finish)
        thread.start()
        assert run("quickstart", align.overrides, console=Console(file=screen), wait=True, command_for=fake) == 0
        thread.join()
    return screen.getvalue()


def test_one_that_waits_takes_what_the_other_run_made(align: Align) -> None:
    align()
    artifact = Path(align.record()["stages"]["sft"]["artifact"])
    hidden = artifact.rename(artifact.with_name("gone"))
    lock = artifact.with_name(f"{artifact.name}.work") / "lock"
    waiting = "sft: another process is working on it; waiting"
    run_that_waits(align, lock, waiting, then=lambda: hidden.rename(artifact))
    assert {name: stage["state"] for name, stage in align.record()["stages"].items()}["sft"] == "reused"
    assert align.record()["stages"]["sft"]["seconds"] == 1.0, "what it took when it was made"


def test_a_wait_for_the_same_run_is_announced_once(align: Align) -> None:
    align()
    waiting = "another process is working on this run; waiting"
    assert run_that_waits(align, align.run_folder / "lock", waiting).count(waiting) == 1


def test_an_error_and_a_cost_of_other_settings_are_forgotten(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_FAULT", "dpo:fail")
    with pytest.raises(NonFiniteError):
        align()
    cost = align.run_folder / "dpo/cost.json"
    cost.write_text("{}")
    monkeypatch.setenv("WORKER_FAULT", "reward:fail")
    with pytest.raises(NonFiniteError):
        align("stages.reward.optim.lr=1e-7")
    assert "the loss is NaN" in load_run(align.run_folder).stages["dpo"].error, "it does not depend on the reward model"
    assert cost.exists()
    with pytest.raises(NonFiniteError):
        align("stages.reward.optim.lr=1e-7", "stages.dpo.beta=0.7")
    assert load_run(align.run_folder).stages["dpo"].error == ""
    assert not cost.exists()


def test_a_wait_for_another_process_is_no_time_of_the_stage(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = time.monotonic, [0.0]

    @contextmanager
    def held_after_an_hour(path: Path, **options: Any) -> Iterator[int]:
        with held(path, **options) as descriptor:
            waited[0] += 3600.0 * path.parent.name.startswith("sft-")
            yield descriptor

    monkeypatch.setattr("alignment.pipeline.execute.run.held", held_after_an_hour)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + waited[0])
    align()
    assert waited == [3600.0]
    assert 0 < align.record()["stages"]["sft"]["seconds"] < 600.0


def test_a_wait_that_is_stopped_is_no_attempt(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def never_held(path: Path, **options: Any) -> Iterator[int]:
        if path.parent.name.startswith("sft-"):
            raise KeyboardInterrupt
        with held(path, **options) as descriptor:
            yield descriptor

    monkeypatch.setattr("alignment.pipeline.execute.run.held", never_held)
    assert align()[0] == 130
    entry = align.record()["stages"]["sft"]
    assert (entry["state"], entry["seconds"], entry["attempts"]) == ("waiting", None, 1)


def test_more_processes_than_the_launcher_can_start_are_refused_before_anything_is_made(overrides: list[str]) -> None:
    with pytest.raises(AlignmentError, match="accelerate starts only one process"):
        run(
            "quickstart",
            [*overrides, "launch.kind=accelerate", "launch.num_processes=2"],
            console=Console(file=StringIO()),
        )
    assert not Path(overrides[0].removeprefix("output=")).exists()


def test_a_killed_driver_shows_as_killed(align: Align) -> None:
    align()
    record = align.record()
    (align.run_folder / "run.json").write_text(json.dumps({**record, "state": "running"}))
    assert align.status().splitlines()[0].split() == ["quickstart", "killed"]
    assert align.status(None).split()[:2] == ["quickstart", "killed"]


def test_a_run_without_a_reward_model_shows_none(overrides: list[str]) -> None:
    screen = StringIO()
    wanted = [text for text in overrides if ".reward." not in text and ".ppo." not in text]
    assert run("sft_dpo", wanted, console=Console(file=screen, width=120), command_for=fake) == 0
    titles = next(line for line in screen.getvalue().splitlines() if line.startswith("arm "))
    assert "log-ratio" in titles
    assert "reward" not in titles


def test_stages_run_one_by_one_make_what_they_make_together(align: Align) -> None:
    for number, stage in enumerate(STAGES, start=1):
        code, printed = align("launch/backend=slurm", "launch.backend.submit=false", only=stage)
        assert code == 0
        assert align.states() == {name: "done" if name in STAGES[:number] else "waiting" for name in STAGES}
        assert align.record()["state"] == ("done" if stage == "report" else "waiting")
    assert "dpo against sft: +0.080" in printed
    assert all(stage["seconds"] is not None for stage in align.record()["stages"].values())
    assert align.record()["overrides"] == [*align.overrides, "launch/backend=slurm"], (
        "how a job calls the driver is not what the user wrote"
    )


DOUBT = "reward: right on 40% of 30 held-out pairs, no better than chance (50%): "


def test_a_reward_model_by_chance_is_said_once_before_ppo_and_in_every_later_call(
    align: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "reward:chance")
    _, printed = align()
    lines = [line.split()[:2] for line in printed.splitlines()]
    assert printed.index(DOUBT) < printed.index("ppo ", printed.index(DOUBT))
    assert printed.count(DOUBT) == 1, lines
    assert align()[1].count(DOUBT) == 1
    assert align.status().count(DOUBT) == 1
    assert DOUBT in (align.run_folder / "report.html").read_text()


def test_what_was_recorded_of_other_stages_stays(align: Align) -> None:
    align(only="sft")
    before = align.record()
    align("stages.reward.optim.lr=2e-4", only="reward")
    assert align.record()["stages"]["sft"] == before["stages"]["sft"]
    assert align.record()["started"] == before["started"]
    assert align.record()["config"]["stages"]["reward"]["optim"]["lr"] == 2e-4
    made = align.record()
    align("stages.sft.optim.lr=2e-4", only="sft")
    now = align.record()
    assert now["stages"]["sft"]["artifact"] != made["stages"]["sft"]["artifact"]
    expected = {**made["stages"]["reward"], "reason": "made with other settings"}
    assert now["stages"]["reward"] == expected, "it is there, though of another sft"
    assert now["config"]["stages"]["reward"] == made["config"]["stages"]["reward"], "what it was made with"


def test_a_run_that_holds_results_of_other_settings_is_not_done(align: Align) -> None:
    align("stages.dpo.beta=0.3")
    made = align.record()
    align(only="sft")
    now = align.record()
    assert now["stages"]["dpo"]["artifact"] == made["stages"]["dpo"]["artifact"]
    assert now["config"]["stages"]["dpo"]["beta"] == 0.3
    assert now["stages"]["dpo"]["state"] == "done"
    assert now["state"] == "waiting"
    align()
    assert align.record()["state"] == "done"
    assert align.record()["config"]["stages"]["dpo"]["beta"] == 0.1


def test_a_stage_that_is_there_is_not_made_again(align: Align) -> None:
    align(only="sft")
    before = align.record()["stages"]["sft"]
    _, printed = align(only="sft")
    assert "sft: reused" in printed
    assert align.record()["stages"]["sft"] == before


def test_a_result_that_another_run_has_made_meanwhile_counts(align: Align) -> None:
    align(only="sft")
    align("name=other", only="reward")
    assert align.states()["reward"] == "waiting"
    align(only="reward")
    assert align.states()["reward"] == "reused"


def test_a_stage_whose_inputs_are_not_there_names_them(align: Align) -> None:
    align(only="sft")
    with pytest.raises(ConfigError) as caught:
        align(only="ppo")
    message = str(caught.value)
    assert message.startswith("--stage: ppo needs the result of reward, which does not exist for these settings yet\n")
    assert "→ first run: align run quickstart output=" in message, "with the settings of this call"
    assert message.endswith(" --stage reward; or leave out --stage to run all stages")
    with pytest.raises(ConfigError, match="--stage: no stage 'dop' in this recipe; did you mean 'dpo'"):
        align(only="dop")


def test_other_machines_see_that_the_first_one_lives(align: Align) -> None:
    machine = ("launch=ddp", "launch.num_processes=1", "launch/backend=machines", "launch.backend.main_address=first")
    align(*machine, "launch.backend.num_machines=2", only="sft")
    assert (align.run_folder / machines.LIFE).is_file()
    align("name=other", only="sft")
    assert not (align.run_folder.with_name("other") / machines.LIFE).exists()


def test_a_checkout_on_a_machine_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit_of_checkout(tmp_path) == ""


def test_an_attempt_that_a_killed_driver_announced_is_forgotten(align: Align) -> None:
    """Another machine would answer it while this run is still checking rows."""
    attempt = align.run_folder / "ppo" / machines.ATTEMPT
    attempt.parent.mkdir(parents=True)
    attempt.write_text('{"attempt": "8e1f", "fingerprint": ""}')
    align("~stages.evaluate", "~stages.report")
    assert not attempt.exists()
