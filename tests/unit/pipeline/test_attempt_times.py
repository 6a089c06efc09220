"""The time of a stage is that of all attempts at it, however the earlier ones ended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from alignment.core.errors import Busy, Preempted, StageError
from alignment.pipeline.execute.attempt_times import counted
from alignment.records.attempts import Attempts
from alignment.records.worker import Heartbeat, Progress, heartbeat_file
from tests.unit.pipeline.remote.conftest import sealed

NOW = time.time()


def fails(error: BaseException) -> Callable[[Path], None]:
    """An attempt that ends with this error."""

    def attempt(work: Path) -> None:
        with pytest.raises(type(error)), counted(work):
            raise error

    return attempt


def beats(work: Path, rank: int, *, at: float) -> None:
    """The last heartbeat of a process, written at this time."""
    file = heartbeat_file(work, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    Heartbeat(pid=1, phase="training", time=5.0, since=5.0, waits=False, location="here").write(file)
    os.utime(file, (at, at))


def test_attempts_that_ended_are_added_up(tmp_path: Path) -> None:
    Attempts(number=2, earlier_seconds=500.0).write(tmp_path)
    fails(StageError("no"))(tmp_path)
    with counted(tmp_path) as attempt:
        assert attempt.number == 4
        assert 500.0 <= attempt.earlier_seconds < 510.0
        assert attempt.started >= NOW


def test_attempts_that_store_nothing_are_counted(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        fails(Preempted("stopped"))(tmp_path)
        assert Attempts.read(tmp_path).without_progress == expected
    with suppress(Preempted), counted(tmp_path):
        sealed(tmp_path, 20)
        raise Preempted("stopped")
    assert Attempts.read(tmp_path).without_progress == 0
    fails(Preempted("stopped"))(tmp_path)
    fails(Busy("another"))(tmp_path)
    assert Attempts.read(tmp_path).without_progress == 1, "what an earlier attempt stored is no progress of this one"
    fails(StageError("no"))(tmp_path)
    assert Attempts.read(tmp_path).without_progress == 0, "it did not lack time"


def test_an_attempt_that_was_killed_counts_until_the_last_sign_of_life(tmp_path: Path) -> None:
    Attempts(number=1, earlier_seconds=20.0, started=NOW - 500.0).write(tmp_path)
    Progress(phase="training").write(tmp_path)
    os.utime(tmp_path / "progress.json", (NOW - 450.0, NOW - 450.0))
    for rank, age in enumerate((130.0, 100.0, 110.0)):
        beats(tmp_path, rank, at=NOW - age)
    with counted(tmp_path) as attempt:
        assert attempt.number == 2
        assert attempt.earlier_seconds == pytest.approx(420.0, abs=0.01)


def test_without_a_sign_of_life_the_steps_that_were_logged_count(tmp_path: Path) -> None:
    """Another machine began the stage: its heartbeats are not here, and the time since then means nothing."""
    Attempts(number=1, started=NOW - 50_000.0).write(tmp_path)
    (tmp_path / "content").mkdir()
    lines = [{"step": 1, "seconds": 3.5}, {"step": 2, "seconds": 321.5}]
    (tmp_path / "content/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    with counted(tmp_path) as attempt:
        assert (attempt.number, attempt.earlier_seconds) == (2, 321.5)


def test_a_sign_of_life_of_an_attempt_before_counts_nothing(tmp_path: Path) -> None:
    Attempts(number=2, earlier_seconds=20.0, started=NOW).write(tmp_path)
    beats(tmp_path, 0, at=NOW - 10.0)
    with counted(tmp_path) as attempt:
        assert attempt.earlier_seconds == 20.0


def test_a_call_that_is_refused_is_no_attempt(tmp_path: Path) -> None:
    running = Attempts(number=1, earlier_seconds=20.0, started=NOW - 500.0)
    running.write(tmp_path)
    fails(Busy("in use"))(tmp_path)
    assert Attempts.read(tmp_path) == running


def test_a_file_that_cannot_be_read_or_written_ends_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attempts.json").write_text('{"number": "two"}')
    with counted(tmp_path) as attempt:
        assert (attempt.number, attempt.earlier_seconds) == (1, 0.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with counted(tmp_path) as attempt:
        assert attempt.number == 2
