"""Plans carried out with real processes and real files; only the training is left out."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from alignment.api.loaded_run import load_run
from alignment.config.launch import LaunchConfig
from alignment.core.errors import (
    AlignmentError,
    ArtifactError,
    Busy,
    ConfigError,
    DiskError,
    NonFiniteError,
    RewardError,
    StageError,
)
from alignment.core.locks import held
from alignment.pipeline.backends import machines, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.slurm_jobs import HERE
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.execute.run import run
from alignment.pipeline.execute.run_state import as_it_is, explanation
from alignment.pipeline.execute.signals import Terminated, termination_raises
from alignment.records.run import Attempts, RunRecord
from alignment.stages.registry import read_spec
from tests.living import wait_until
from tests.unit.pipeline.conftest import faulty_keys, status_of

ROOT = Path(__file__).parents[3]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
STAGES = ["sft", "evaluate_sft", "reward", "dpo", "ppo", "evaluate", "report"]


def fake(launch: LaunchConfig, stage_file: Path) -> Command:
    argv = (sys.executable, str(Path(__file__).with_name("worker.py")), str(stage_file))
    return Command(argv=argv, environment={"PYTHONPATH": str(ROOT)})


class Align:
    """``align run`` and ``align status`` in a folder of their own."""

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides
        self.output = Path(overrides[0].removeprefix("output="))
        self.run_folder = self.output / "runs/quickstart"

    def __call__(self, *more: str, only: str | None = None, verified: bool = False) -> tuple[int, str]:
        screen = StringIO()
        console = Console(file=screen, width=120)
        settings = [*self.overrides, *more]
        code = run("quickstart", settings, console=console, only=only, verified=verified, command_for=fake)
        return code, screen.getvalue()

    def status(self, name: str | None = "quickstart") -> str:
        return status_of(self.output, name)

    def record(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run_folder / "run.json").read_text())
        return content

    def artifact(self, stage: str) -> Path:
        return Path(self.record()["stages"][stage]["artifact"])

    def states(self) -> dict[str, str]:
        return {name: stage["state"] for name, stage in self.record()["stages"].items()}


@pytest.fixture
def align(overrides: list[str]) -> Align:
    return Align(overrides)


@pytest.fixture
def break_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda fault: monkeypatch.setenv("WORKER_FAULT", fault)


def test_a_run_makes_every_stage_and_a_second_one_reuses_them(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = align()
    assert (code, align.states(), align.record()["state"]) == (0, dict.fromkeys(STAGES, "done"), "done")
    assert not list((align.output / "artifacts").glob("*.work"))
    assert (align.run_folder / "report.html").stat().st_size > 1000
    assert "dpo against sft: +0.080 (+0.020 to +0.140), better" in printed
    base_against_sft = "base against sft: -0.010 (-0.050 to +0.030), no real difference"
    assert base_against_sft in printed.partition("reward: starts")[2]
    assert f"evaluate_sft: {base_against_sft}" in printed.partition("reward: starts")[0], "a verdict while others train"
    assert "evaluate: dpo" not in printed, "the last one is said once, at the end"
    assert f"report: {align.run_folder / 'report.html'}" in printed
    spec = yaml.safe_load((align.run_folder / "evaluate/stage.yaml").read_text())
    assert (spec["config"]["kind"], spec["inputs"]["reward"]["ref"]) == ("evaluate", "stage:reward")
    assert list(spec["arms"]) == ["base", "base+prompt", "stage:sft", "stage:dpo", "stage:ppo"]
    assert spec["arms"]["base+prompt"] == {"ref": "base+prompt", "path": None}
    assert spec["arms"]["stage:dpo"]["path"] == str(align.artifact("dpo"))
    assert Path(spec["base_path"]).is_absolute()
    assert (align.run_folder / "dpo/log.txt").read_text().splitlines()[1:] == ["working on dpo"]

    def starts(*_: Any, **__: Any) -> int:
        raise AssertionError("a reused stage starts nothing")

    monkeypatch.setattr(processes, "execute", starts)
    code, again = align()
    assert (code, align.states(), "better" in again) == (0, dict.fromkeys(STAGES, "reused"), True)
    assert all(stage["seconds"] is not None for stage in align.record()["stages"].values())
    assert "reused" in align.status()
    record = align.record()
    (align.run_folder / "run.json").write_text(json.dumps({**record, "state": "running"}))
    assert align.status().splitlines()[0].split() == align.status(None).split()[:2] == ["quickstart", "killed"]
    monkeypatch.undo()
    align("stages.dpo.beta=0.3", "launch.num_processes=1")
    assert align.states() == dict.fromkeys(STAGES, "reused") | dict.fromkeys(["dpo", "evaluate", "report"], "done")
    assert align.record()["stages"]["dpo"]["reason"].startswith("beta 0.1 → 0.3 (nearest: dpo-")


def test_a_damaged_result_is_moved_away_and_made_again(align: Align) -> None:
    align()
    artifact = align.artifact("reward")
    aside = artifact.with_name(f"{artifact.name}.damaged")
    made = (artifact / "metrics.jsonl").read_bytes()
    (artifact / "metrics.jsonl").write_bytes(made[:-2] + b" \n")
    align()
    assert align.states() == dict.fromkeys(STAGES, "reused"), "its size is right"
    _, printed = align(verified=True)
    assert align.states() == dict.fromkeys(STAGES, "reused") | {"reward": "done"}
    assert (artifact / "metrics.jsonl").read_bytes() == made
    assert (aside / "metrics.jsonl").read_bytes() == made[:-2] + b" \n"
    assert f"reward: {artifact.name} is damaged, and was moved to {aside}" in printed
    (artifact / "metrics.jsonl").unlink()
    align()
    assert align.states()["reward"] == "done"
    assert not (aside / "metrics.jsonl").exists(), "the folder of the last damage replaces the one before"


def test_what_a_worker_says_of_its_failure_reaches_the_user(align: Align, break_stage: Callable[[str], None]) -> None:
    break_stage("dpo:fail")
    with pytest.raises(NonFiniteError) as caught:
        align()
    log = align.run_folder / "dpo/log.txt"
    assert str(caught.value) == f"stage dpo: the loss is NaN at step 3\n  → lower the learning rate\n  log: {log}"
    assert align.states() | {"sft": "done", "dpo": "failed", "ppo": "waiting"} == align.states()
    assert (align.record()["state"], f"log: {log}" in align.status()) == ("failed", True)
    break_stage("dpo:note")
    assert align()[1].count("dpo: TensorBoard failed") == 1
    assert (align.states()["sft"], align.states()["dpo"]) == ("reused", "done")


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("sft:crash", StageError, ["by signal 9", "memory", "'trying the longest batch'", "| working on sft"]),
        ("sft:silence", StageError, ["exit code 1"]),
        ("sft:template", StageError, ["SIGVTALRM", "chat template"]),
        ("sft:disk", DiskError, ["4 kB are free", "log.txt"]),
        ("sft:torn", ArtifactError, ["status.json", "state: 3", "log.txt"]),
        ("sft:lie", ArtifactError, ["its result is missing"]),
        ("ppo:reward", RewardError, ["stage ppo: score.py:brevity: gave nan"]),
        ("sft:bug", AlignmentError, ["KeyError: 'x'", "a bug in this project", "| working on sft"]),
    ],
)
def test_a_worker_that_ends_badly_is_shown_with_its_last_words(
    align: Align, break_stage: Callable[[str], None], fault: str, error: type[AlignmentError], words: list[str]
) -> None:
    """Whatever it said in an attempt before."""
    stage = fault.partition(":")[0]
    break_stage(f"{stage}:fail")
    with pytest.raises(NonFiniteError):
        align()
    break_stage(fault)
    with pytest.raises(error) as caught:
        align()
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words)
    assert align.states()[stage] == "failed"


def test_a_full_disk_is_named_where_a_worker_could_not_say_so(
    align: Align, break_stage: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_stage("sft:crash")
    monkeypatch.setattr(worker_protocol, "is_full", lambda _: True)
    with pytest.raises(DiskError, match="could not record"):
        align()


def test_a_stage_holds_its_lock_itself(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver may be killed while it works on, and nobody else may begin then."""
    started: list[tuple[bool, float]] = []
    execute = processes.execute

    def noted(command: Command, *, log: Path, keep_open: Sequence[int], **options: Any) -> int:
        lock = read_spec(log.with_name("stage.yaml")).work / "lock"
        is_held = [os.fstat(number).st_ino for number in keep_open] == [lock.stat().st_ino]
        started.append((is_held, options["grace_seconds"]))
        return execute(command, log=log, keep_open=keep_open, **options)

    monkeypatch.setattr(processes, "execute", noted)
    align("launch.grace_seconds=7", only="sft")
    assert started == [(True, 7)]


def test_a_job_that_stores_nothing_is_not_queued_again_forever(
    align: Align, break_stage: Callable[[str], None]
) -> None:
    """Exit code 75 lets its script queue it again; a benchmark, for example, would begin anew each time."""
    job = ("launch/backend=slurm", HERE)
    break_stage("sft:preempt")
    code, printed = align(*job, only="sft")
    assert (code, align.record()["state"], align.states()["sft"]) == (75, "preempted", "waiting")
    assert "sft: stopped on request" in printed, "the worker knows whether it could save"
    assert "run the same command to continue" in printed
    assert align(*job, only="sft")[0] == 75
    with pytest.raises(StageError, match="3 attempts") as caught:
        align(*job, only="sft")
    assert "launch.backend.time" in caught.value.remedy
    assert [align(only="sft")[0] for _ in range(4)] == [75] * 4, "a person who starts a run again is not refused"
    break_stage("sft:part")
    assert [align(*job, only="sft")[0] for _ in range(4)] == [75] * 4, "each stored something"


def test_a_continued_stage_counts_and_logs_all_attempts(align: Align, break_stage: Callable[[str], None]) -> None:
    break_stage("sft:preempt")
    align()
    stopped, log = align.record()["stages"]["sft"], align.run_folder / "sft/log.txt"
    work = Path(f"{stopped['artifact']}.work")
    assert Attempts.read(work).earlier_seconds == pytest.approx(stopped["seconds"], abs=0.5)
    Attempts(number=1, earlier_seconds=3600.0).write(work)  # as if it had taken an hour
    log.write_text(f"{log.read_text()}killed in half a li")
    break_stage("")
    _, printed = align()
    assert "sft: done  1 h 00 min in 2 attempts  sft-" in printed
    entry = align.record()["stages"]["sft"]
    assert (entry["attempts"], entry["earlier_seconds"], 3600.0 < entry["seconds"] < 3700.0) == (2, 3600.0, True)
    assert "1 h 00 min in 2 attempts" in align.status()
    assert "1\u202fh 00\u202fmin in 2 attempts" in (align.run_folder / "report.html").read_text()
    assert align.record()["stages"]["dpo"]["attempts"] == 1
    name = align.artifact("sft").name
    begins = [f"=== TIME  attempt {number} at {name} ===" for number in (1, 2)]
    lines = [TIME.sub("TIME", line) for line in log.read_text().splitlines()]
    assert lines == [begins[0], "working on sft", "killed in half a li", begins[1], "working on sft"]


@pytest.mark.parametrize(
    ("number", "code", "state", "again"),
    [
        (signal.SIGINT, 130, "interrupted", True),
        (signal.SIGTERM, 75, "preempted", False),
        (signal.SIGHUP, 75, "preempted", False),
    ],
)
def test_a_signal_to_the_driver_is_acknowledged_and_lets_the_stage_save_first(
    align: Align, break_stage: Callable[[str], None], number: signal.Signals, code: int, state: str, *, again: bool
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    break_stage("sft:hang")
    over = threading.Event()

    def send() -> None:
        while not (align.run_folder / "sft/hanging").exists():
            if over.wait(0.05):
                return
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        ended, printed = align()
    finally:
        over.set()
        sender.join()
    assert (ended, align.record()["state"]) == (code, state)
    assert printed.index("stopping: the stage will finish its step, save") < printed.index("sft: stopped")
    assert ("press Ctrl-C again" in printed) is again
    assert json.loads((align.run_folder / "sft/status.json").read_text())["state"] == "preempted"


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGHUP])
def test_a_second_request_does_not_cut_short_what_the_first_began(first: signal.Signals) -> None:
    """A scheduler sends SIGUSR1 and then SIGTERM; a shell hands on the SIGHUP that everyone has already."""
    second = signal.SIGHUP if first == signal.SIGHUP else signal.SIGTERM
    arrived: list[int] = []
    signal.signal(second, lambda number, _: arrived.append(number))

    def stopped() -> None:
        with termination_raises():
            try:
                signal.raise_signal(first)
            finally:
                os.kill(os.getpid(), second)
                arrived.append(0)

    with pytest.raises(Terminated):
        stopped()
    assert arrived == [0], "what the first began came to its end"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with termination_raises():
        os.kill(os.getpid(), signal.SIGHUP)


def test_what_a_killed_process_left_is_cleared_and_what_others_write_is_not(align: Align) -> None:
    """A job begins while the command that submits the chain still writes jobs.json."""
    attempt = align.run_folder / "ppo" / machines.ATTEMPT  # another machine would answer it too early
    attempt.parent.mkdir(parents=True)
    attempt.write_text('{"attempt": "8e1f", "fingerprint": ""}')
    being_written = align.run_folder / ".jobs.json.0a1b.tmp"
    being_written.touch()
    align()
    assert (attempt.exists(), being_written.exists()) == (False, True)
    artifact = align.artifact("sft")
    work, old = artifact.with_name(f"{artifact.name}.work"), align.run_folder / ".run.json.0a1b.tmp"
    (work / "checkpoints/checkpoint-4").mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    with held(work / "worker.lock", wait=False):
        align()
        assert work.exists(), "its process is still about"
    align()
    assert not work.exists()
    artifact.rename(artifact.with_name("gone"))
    for name in (".progress.json.0a.tmp", "content/.manifest.json.0b.tmp", "content/model/.weights.0c.tmp"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    align()
    assert list(align.output.rglob("*.tmp")) == [being_written]
    assert not any(".tmp" in name for name in json.loads((artifact / "manifest.json").read_text())["files"])


def test_an_error_and_a_cost_of_other_settings_are_forgotten(align: Align, break_stage: Callable[[str], None]) -> None:
    def fail(stage: str, *overrides: str) -> str:
        break_stage(f"{stage}:fail")
        with pytest.raises(NonFiniteError):
            align(*overrides)
        return load_run(align.run_folder).stages["dpo"].error

    fail("dpo")
    cost = align.run_folder / "dpo/cost.json"
    cost.write_text("{}")
    other_reward = "stages.reward.optim.lr=1e-7"
    assert "the loss is NaN" in fail("reward", other_reward), "it does not depend on the reward model"
    assert cost.exists()
    assert fail("reward", other_reward, "stages.dpo.beta=0.7") == ""
    assert not cost.exists()


def test_a_batch_that_cannot_be_split_is_refused_before_anything_starts(align: Align) -> None:
    with pytest.raises(ConfigError) as caught:
        align("launch.num_processes=3", "stages.ppo.optim.batch_size=36", "stages.reward.optim.batch_size=12")
    assert faulty_keys(caught.value) == ["stages.sft.optim.batch_size", "stages.dpo.optim.batch_size"]
    assert not (align.run_folder / "sft").exists()


@pytest.mark.parametrize(("number", "error"), [(errno.EDQUOT, DiskError), (errno.EACCES, ConfigError)])
def test_a_disk_without_room_for_a_folder_is_no_fault_of_the_settings(
    align: Align, monkeypatch: pytest.MonkeyPatch, number: int, error: type[AlignmentError]
) -> None:
    """A sweep records faults of settings for good."""

    def mkdir(path: Path, mode: int = 0o777) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(error):
        align()


def test_a_run_or_a_result_that_another_process_works_on_is_left_alone(align: Align) -> None:
    remedy = f"`kill {os.getpid()}`"
    with held(align.run_folder / "lock", wait=False), pytest.raises(Busy, match=f"process {os.getpid()}") as caught:
        align()
    assert ("--wait" in caught.value.remedy, remedy in caught.value.remedy) == (True, True)
    assert not (align.run_folder / "run.json").exists()
    align()
    artifact = align.artifact("sft")
    artifact.rename(artifact.with_name("gone"))
    with held(artifact.with_name(f"{artifact.name}.work") / "lock", wait=False):
        with pytest.raises(Busy, match=remedy):
            align()
        record = RunRecord.read(align.run_folder)
        known = explanation(align.run_folder, as_it_is(align.run_folder, record))
        assert known[0] == "another process is working on sft"
    left = as_it_is(align.run_folder, record)
    assert (left.state, left.stages["sft"].state) == ("waiting", "waiting"), "nobody killed this run"


def run_that_waits(align: Align, lock: Path, announcement: str, *, then: Callable[[], object] = lambda: None) -> str:
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


def test_one_that_waits_says_so_once_and_takes_what_the_other_run_made(align: Align) -> None:
    align()
    waiting = "another process is working on this run; waiting"
    assert run_that_waits(align, align.run_folder / "lock", waiting).count(waiting) == 1
    artifact = align.artifact("sft")
    hidden = artifact.rename(artifact.with_name("gone"))
    lock, waiting = artifact.with_name(f"{artifact.name}.work") / "lock", "sft: another process is working on it"
    run_that_waits(align, lock, waiting, then=lambda: hidden.rename(artifact))
    assert align.states()["sft"] == "reused"
    assert align.record()["stages"]["sft"]["seconds"] == 1.0, "what it took when it was made"


def test_stages_run_one_by_one_make_what_they_make_together(align: Align) -> None:
    for number, stage in enumerate(STAGES, start=1):
        code, printed = align("launch/backend=slurm", "launch.backend.submit=false", only=stage)
        assert (code, align.record()["state"]) == (0, "done" if stage == "report" else "waiting")
        assert align.states() == {name: "done" if name in STAGES[:number] else "waiting" for name in STAGES}
    assert "dpo against sft: +0.080" in printed
    assert all(stage["seconds"] is not None for stage in align.record()["stages"].values())
    assert align.record()["overrides"] == [*align.overrides, "launch/backend=slurm"], (
        "how a job calls the driver is not what the user wrote"
    )


def test_what_was_recorded_of_other_stages_stays(align: Align) -> None:
    align("stages.dpo.beta=0.3")
    before = align.record()
    align("stages.sft.optim.lr=2e-4", only="sft")
    now = align.record()
    assert (now["state"], now["config"]["stages"]["dpo"]["beta"]) == ("waiting", 0.3), "what it was made with"
    assert now["stages"]["sft"]["artifact"] != before["stages"]["sft"]["artifact"]
    assert now["stages"]["reward"] == {**before["stages"]["reward"], "reason": "made with other settings"}
    align()
    assert (align.record()["state"], align.record()["config"]["stages"]["dpo"]["beta"]) == ("done", 0.1)


def test_a_stage_whose_inputs_are_not_there_names_them(align: Align) -> None:
    align(only="sft")
    with pytest.raises(ConfigError) as caught:
        align(only="ppo")
    assert (caught.value.where, "ppo needs the result of reward" in caught.value.message) == ("--stage", True)
    assert f"align run quickstart {align.overrides[0]}" in caught.value.remedy, "with the settings of this call"
    assert "--stage reward;" in caught.value.remedy
    with pytest.raises(ConfigError, match="--stage: no stage 'dop' in this recipe; did you mean 'dpo'"):
        align(only="dop")
    align("name=other", only="reward")
    assert align.states()["reward"] == "waiting"
    align(only="reward")
    assert align.states()["reward"] == "reused", "another run has made it meanwhile"


def test_a_reward_model_by_chance_is_said_once_in_every_call(align: Align, break_stage: Callable[[str], None]) -> None:
    doubt = "reward: right on 40% of 30 held-out pairs, no better than chance (50%): "
    break_stage("reward:chance")
    _, printed = align()
    assert printed.index(doubt) < printed.index("ppo ", printed.index(doubt))
    assert [text.count(doubt) for text in (printed, align()[1], align.status())] == [1, 1, 1]
    assert doubt in (align.run_folder / "report.html").read_text()
