"""Machines after the first: they answer each attempt at a stage once, and end as the run does."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from alignment.config.backend import MachinesBackend
from alignment.config.launch import LaunchConfig
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import ConfigError, StageError
from alignment.pipeline.backends import late_results, machines, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.execute.signals import Terminated
from alignment.pipeline.plan.actions import Action
from alignment.stages.benchmark.config import BenchmarkConfig
from alignment.stages.sft.config import SftConfig
from tests.living import wait_until

LAUNCH = LaunchConfig(backend=MachinesBackend(machine_rank=1), grace_seconds=7)


class Shared:
    """A folder that two machines share, with one stage to make."""

    def __init__(self, folder: Path) -> None:
        self.stage = SimpleNamespace(
            name="sft",
            config=SftConfig(),
            action=Action.run,
            artifact=folder / "artifacts" / "sft-01234567",
            fingerprint="0" * 64,
        )
        alone = SimpleNamespace(name="tasks", config=BenchmarkConfig(), action=Action.run, artifact=folder / "never")
        config = SimpleNamespace(launch=LAUNCH)
        self.plan: Any = SimpleNamespace(
            run_folder=folder / "runs" / "r", stages=(self.stage, alone), config=config, store=None
        )
        (self.plan.run_folder / "sft").mkdir(parents=True)
        self.started = folder / "started"
        self.content = folder / "content"
        self.content.mkdir()

    def says(self, state: str) -> None:
        (self.plan.run_folder / "run.json").write_text(json.dumps({"state": state}))

    def publish(self) -> None:
        (self.content / "metrics.jsonl").touch()
        publish(
            self.content, self.stage.artifact, Manifest(stage="sft", kind="policy", fingerprint="0" * 64, identity={})
        )

    def command(self, launch: LaunchConfig, stage_file: Path) -> Command:
        """A launcher's stand-in that notes that it ran."""
        assert stage_file == self.plan.run_folder / "sft" / "stage.yaml"
        code = f"open({str(self.started)!r}, 'a').write('{launch.backend.machine_rank}\\n')"
        return Command(argv=(sys.executable, "-c", code), environment={})

    def follow(self) -> int:
        return machines.follow(self.plan, self.plan.stages, console=Console(quiet=True), command_for=self.command)

    def starts(self) -> int:
        return len(self.started.read_text().splitlines()) if self.started.exists() else 0


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    monkeypatch.setattr(late_results, "_SHOWN_LATE_SECONDS", 0.2)
    monkeypatch.setattr(late_results, "_POLL_SECONDS", 0.01)
    return Shared(tmp_path)


@pytest.fixture
def folder(shared: Shared) -> Path:
    """Where attempts at the stage are announced."""
    return Path(shared.plan.run_folder / "sft")


@contextmanager
def following(shared: Shared) -> Iterator[threading.Thread]:
    """A machine that follows while the block runs, at whose end the result is there; signals are the main thread's."""
    codes: list[int] = []
    follower = machines._Follower(shared.plan, shared.stage, shared.command, Console())
    thread = threading.Thread(target=lambda: codes.append(follower.follow()))
    thread.start()
    yield thread
    shared.publish()
    thread.join(30)
    assert codes == [0]


def test_an_attempt_is_answered_once_and_another_one_again(
    shared: Shared, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = mock.Mock(side_effect=processes.execute)
    monkeypatch.setattr(processes, "execute", execute)
    with following(shared):
        for attempt in (1, 2):
            with machines.announced(folder, LAUNCH, "0" * 64):
                wait_until(lambda attempt=attempt: shared.starts() == attempt)
    assert shared.starts() == 2
    assert [call.kwargs["grace_seconds"] for call in execute.call_args_list] == [7, 7]
    begun = (folder / "log-1.txt").read_text().splitlines()
    assert [line.partition("  ")[2] for line in begun] == ["attempt at sft-01234567 ==="] * 2
    assert not (folder / machines.ATTEMPT).exists()


def test_an_attempt_of_a_first_machine_that_was_killed_is_not_answered(shared: Shared, folder: Path) -> None:
    """It had other settings, and the first machine does not live until it announces an attempt of its own."""
    with machines.showing_life(shared.plan.run_folder, LAUNCH):
        pass
    with machines.announced(folder, LAUNCH, "1" * 64):
        killed = (folder / machines.ATTEMPT).read_text()
    (folder / machines.ATTEMPT).write_text(killed)
    with following(shared) as follower:
        time.sleep(3 * machines._POLL_SECONDS)
        assert follower.is_alive()
        with machines.announced(folder, LAUNCH, "0" * 64):
            wait_until(lambda: shared.starts() == 1)


def test_an_attempt_that_began_earlier_is_answered_if_the_first_machine_lives(shared: Shared, folder: Path) -> None:
    lives = machines.showing_life(shared.plan.run_folder, LAUNCH)
    with machines.announced(folder, LAUNCH, "0" * 64), lives, following(shared):
        wait_until(lambda: shared.starts() == 1)


def test_one_machine_leaves_no_word(shared: Shared, folder: Path) -> None:
    with machines.announced(folder, LaunchConfig(), "0" * 64):
        assert list(folder.iterdir()) == []


def test_what_is_there_already_starts_nothing(shared: Shared) -> None:
    shared.publish()
    assert (shared.follow(), shared.starts()) == (0, 0)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[str]]:
    """The states of the run, one for each look."""

    def states(*words: str) -> Iterator[str]:
        remaining = iter(words)
        monkeypatch.setattr(machines, "_state", lambda _: next(remaining))
        return remaining

    return states


@pytest.mark.parametrize(("state", "code"), [("preempted", 75), ("interrupted", 130)])
def test_it_ends_as_the_first_machine_does(
    shared: Shared, state: str, code: int, says: Callable[..., Iterator[str]]
) -> None:
    says("running", state)
    assert shared.follow() == code


@pytest.mark.parametrize(
    ("state", "code"), [("running", 75), ("preempted", 75), ("interrupted", 75), ("failed", 5), ("waiting", 5), ("", 5)]
)
def test_asked_to_stop_it_is_queued_again_only_with_a_run_at_work(
    shared: Shared, state: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: machines._Follower) -> int:
        raise Terminated

    shared.says(state)
    monkeypatch.setattr(machines._Follower, "follow", stopped)
    assert shared.follow() == code


def test_a_result_that_the_file_system_shows_late_is_waited_for(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, says: Callable[..., Iterator[str]]
) -> None:
    states = says("running", "done")
    later = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: shared.publish())
    monkeypatch.setattr(late_results, "time", later)
    assert shared.follow() == 0
    assert next(states, None) is None


def test_what_an_earlier_run_left_is_not_taken_for_the_end_of_this_one(
    shared: Shared, says: Callable[..., Iterator[str]]
) -> None:
    states = says("failed", "failed", "running", "failed")
    with pytest.raises(StageError, match="failed on the first machine"):
        shared.follow()
    assert next(states, None) is None


def test_a_machine_that_would_make_something_else_is_refused(
    shared: Shared, folder: Path, says: Callable[..., Iterator[str]]
) -> None:
    lives, is_refused = machines.showing_life(shared.plan.run_folder, LAUNCH), "produces a different result"
    with machines.announced(folder, LAUNCH, "1" * 64), lives, pytest.raises(ConfigError, match=is_refused):
        shared.follow()
    assert shared.starts() == 0
    says("running", "done")
    with pytest.raises(ConfigError, match=is_refused):
        shared.follow()


def test_no_machine_waits_for_one_that_is_gone(shared: Shared) -> None:
    shared.says("running")
    shared.plan.config.launch = replace(LAUNCH, hang_seconds=1)
    with pytest.raises(StageError, match="the first machine has not responded for 1 seconds"):
        shared.follow()
    with machines.showing_life(shared.plan.run_folder.parent, LaunchConfig()):
        time.sleep(0.1)
    assert not (shared.plan.run_folder.parent / machines.LIFE).exists(), "there is no other machine"


def test_the_first_machine_lives_whatever_it_does(shared: Shared) -> None:
    """Such as an upload, in which it watches no process."""
    life = shared.plan.run_folder / machines.LIFE
    with machines.showing_life(shared.plan.run_folder, LAUNCH):
        wait_until(life.exists)
        os.utime(life, (1.0, 1.0))
        wait_until(lambda: life.stat().st_mtime != 1.0)
    os.utime(life, (1.0, 1.0))
    time.sleep(2 * machines._POLL_SECONDS)
    assert life.stat().st_mtime == 1.0


def test_with_a_store_other_machines_wait_until_the_first_has_uploaded(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may end the first one soon after another has ended."""
    shared.publish()
    shared.says("running")
    shared.plan.store = object()
    shared.plan.config.launch = replace(LAUNCH, hang_seconds=2)
    monkeypatch.setattr(machines, "_POLL_SECONDS", 0.05)
    codes: list[int] = []
    with machines.showing_life(shared.plan.run_folder, LAUNCH):
        follower = threading.Thread(target=lambda: codes.append(shared.follow()))
        follower.start()
        follower.join(3)
        assert follower.is_alive()
        shared.says("done")
        follower.join(30)
    assert codes == [0]
    shared.says("running")
    follower = threading.Thread(target=lambda: codes.append(shared.follow()), daemon=True)
    follower.start()
    follower.join(30)
    assert codes == [0, 0], "the first machine is gone"


@pytest.mark.parametrize("date", [1.0, 4e9])
def test_a_sign_of_life_counts_because_it_is_new_whatever_its_date(shared: Shared, date: float) -> None:
    """Clocks of two machines differ, and may be set while they work."""
    follower = machines._Follower(shared.plan, shared.stage, shared.command, Console())
    life = shared.plan.run_folder / machines.LIFE
    life.touch()
    os.utime(life, (date, date))
    shared.plan.config.launch = replace(LAUNCH, hang_seconds=1)
    follower._signs._heard -= 2
    follower._refuse_silence()
    follower._signs._heard -= 2
    with pytest.raises(StageError, match="the first machine has not responded"):
        follower._refuse_silence()
    os.utime(life, (date + 1, date + 1))
    follower._refuse_silence()
