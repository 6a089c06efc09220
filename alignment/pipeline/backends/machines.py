"""Several machines on one shared folder: the first runs the plan, the others start their processes of each stage.

Before a stage's processes start, the first machine announces the attempt in a file next to the stage's file. Every
other machine answers each attempt once, with the same command under its own rank. While the first machine is working,
it shows signs of life, so that the others do not wait for a machine that is gone.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from alignment.config.launch import LaunchConfig
from alignment.core import hardware
from alignment.core.artifacts import read_manifest, write_json
from alignment.core.errors import PREEMPTED, ConfigError, StageError
from alignment.core.terminal import begin_attempt
from alignment.pipeline.backends import feasibility, processes, slurm_jobs
from alignment.pipeline.backends.command import CommandFor
from alignment.pipeline.execute.gates import NOT_MET
from alignment.pipeline.execute.signals import INTERRUPTED, Terminated, acknowledgement, termination_raises
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.run import RunRecord
from alignment.stages.registry import kind_of

ATTEMPT = "attempt.json"
LIFE = "machine-0.alive"
_POLL_SECONDS = 0.5
_STOPPED = {"preempted": PREEMPTED, "interrupted": INTERRUPTED}


@contextmanager
def announced(folder: Path, launch: LaunchConfig, fingerprint: str) -> Iterator[None]:
    """Announces an attempt at a stage in its folder while the block runs, if there are other machines."""
    file = folder / ATTEMPT
    if launch.backend.num_machines == 1:
        yield
        return
    write_json(file, {"attempt": uuid.uuid4().hex, "fingerprint": fingerprint})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def forget_attempts(plan: Plan) -> None:
    """Removes what a first machine that was killed had announced. The caller holds the run's lock."""
    for stage in plan.stages:
        (plan.run_folder / stage.name / ATTEMPT).unlink(missing_ok=True)


@contextmanager
def showing_life(run_folder: Path, launch: LaunchConfig) -> Iterator[None]:
    """Renews the first machine's sign of life while the block runs, whatever it does, if there are other machines."""
    if launch.backend.num_machines == 1:
        yield
        return
    is_over = threading.Event()

    def renew() -> None:
        while True:
            with suppress(OSError):  # the next one is due in half a second
                (run_folder / LIFE).touch()
            if is_over.wait(_POLL_SECONDS):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(1)  # a file system may hang


def follow(plan: Plan, stages: Sequence[PlannedStage], *, console: Console, command_for: CommandFor) -> int:
    launch = plan.config.launch
    machine = f"machine {launch.backend.machine_rank} of {launch.backend.num_machines}"
    try:
        with termination_raises():
            for stage in stages:
                if stage.action is Action.reuse or not kind_of(stage.config).launch.runs_on.on_all:
                    continue
                console.print(f"{stage.name}: {machine} is waiting for the first machine to start it", highlight=False)
                code = _Follower(plan, stage, command_for, console).follow()
                if code:
                    return code
            if plan.store is not None:
                _wait_for_uploads(plan)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        # A job of Slurm is queued again if any machine ends with 75. If the first one has failed before it began,
        # its exit code must decide: the job would fail again, without an end.
        return PREEMPTED if _state(plan.run_folder) in ("running", *_STOPPED) else StageError.exit_code
    console.print(f"{machine} has nothing left to do", highlight=False)
    return 0


def _wait_for_uploads(plan: Plan) -> None:
    """Returns when the first machine has ended: a launcher may end it as soon as another machine has nothing to do."""
    signs, limit = _SignsOfLife(plan.run_folder), plan.config.launch.hang_seconds
    while _state(plan.run_folder) in ("running", "") and not signs.are_missing(limit):
        time.sleep(_POLL_SECONDS)


class _SignsOfLife:
    """The first machine is alive as long as the file's time changes; the two clocks need not agree."""

    def __init__(self, run_folder: Path) -> None:
        self._file = run_folder / LIFE
        self._last: int | None = None
        self._heard = time.monotonic()
        self.have_changed = False

    def are_missing(self, limit: float) -> bool:
        with suppress(OSError):  # not there yet, or not for a moment (ESTALE)
            last = self._file.stat().st_mtime_ns
            if last != self._last:
                self.have_changed = self._last is not None
                self._last, self._heard = last, time.monotonic()
        return bool(limit) and time.monotonic() - self._heard > limit


class _Follower:
    """Answers attempts at one stage until its artifact is there."""

    def __init__(self, plan: Plan, stage: PlannedStage, command_for: CommandFor, console: Console) -> None:
        self._plan, self._stage, self._command_for, self._console = plan, stage, command_for, console
        self._folder = plan.run_folder / stage.name
        self._answered = ""
        self._seen_running = False
        self._signs = _SignsOfLife(plan.run_folder)

    def follow(self) -> int:
        earlier = _read(self._folder / ATTEMPT).get("attempt", "")  # may be of a first machine that was killed
        while read_manifest(self._stage.artifact) is None:
            attempt = _read(self._folder / ATTEMPT)
            is_new = attempt.get("attempt", self._answered) != self._answered
            if is_new and (attempt["attempt"] != earlier or self._signs.have_changed):
                self._answer(attempt)
                continue
            state = _state(self._plan.run_folder)
            self._seen_running = self._seen_running or state == "running"
            if self._seen_running and state in _STOPPED:
                return _STOPPED[state]
            if self._seen_running and state == "failed":
                raise self._failed("the run failed on the first machine")
            if self._seen_running and state in ("done", NOT_MET) and not slurm_jobs.is_shown(self._stage.artifact):
                raise self._different_result()
            limit = self._plan.config.launch.hang_seconds
            if self._signs.are_missing(limit):
                raise self._failed(f"the first machine has not responded for {limit} seconds (launch.hang_seconds)")
            time.sleep(_POLL_SECONDS)
        return 0

    def _answer(self, attempt: dict[str, str]) -> None:
        if attempt["fingerprint"] != self._stage.fingerprint:
            raise self._different_result()
        self._answered, self._seen_running = attempt["attempt"], True
        num_devices = hardware.count_devices()
        launch = feasibility.of_stage(self._plan.config.launch, self._stage.config, num_devices=num_devices)
        log = self._folder / f"log-{launch.backend.machine_rank}.txt"
        begin_attempt(log, f"attempt at {self._stage.artifact.name}")
        processes.execute(
            self._command_for(launch, self._folder / "stage.yaml"),
            log=log,
            on_poll=lambda: None,  # the first machine watches the processes of all
            on_stop=lambda stop: self._console.print(acknowledgement(stop), highlight=False),
            grace_seconds=launch.grace_seconds,
        )

    def _failed(self, message: str) -> StageError:
        own = f"log-{self._plan.config.launch.backend.machine_rank}.txt"
        remedy = f"look there, or in {self._folder / 'log.txt'} and {self._folder / own}"
        return StageError(message, where=f"stage {self._stage.name}", remedy=remedy)

    def _different_result(self) -> ConfigError:
        message = "the first machine produces a different result than this one would"
        remedy = "start the same command on each machine, with the same code and data; only machine_rank may differ"
        return ConfigError(message, where=f"stage {self._stage.name}", remedy=remedy)


def _read(file: Path) -> dict[str, str]:
    try:
        attempt: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:  # not there, or just replaced by the first machine (ESTALE)
        return {}
    return attempt


def _state(run_folder: Path) -> str:
    return RunRecord.read_if_any(run_folder).state
