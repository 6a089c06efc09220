"""Which of a stage's processes is stuck, told from their signs of life."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import StageError
from alignment.pipeline.execute.heartbeats import ProcessState, Watch, refuse_stuck
from alignment.records.worker import Heartbeat, Progress, heartbeat_file


def _sign(rank: int, **changes: Any) -> ProcessState:
    """One that gave a sign just now and did something a moment before."""
    silent = changes.pop("silent", 0.0)
    last = Heartbeat(pid=1, phase="training", time=5000.0, since=4999.5, waits=False, location=f"here{rank}")
    return ProcessState(rank=rank, last=replace(last, **changes), silent=silent)


def _judge(*signs: ProcessState, processes: int | None = None) -> None:
    refuse_stuck(signs, processes=processes or len(signs), limit=60, stage="sft")


STUCK = {"since": 4939.0}
WAITING = {"since": 4939.0, "waits": True}


def test_while_one_is_at_work_nobody_is_stuck() -> None:
    _judge(_sign(0, **WAITING), _sign(1))
    _judge(_sign(0, since=4941.0))


def test_who_has_not_started_is_waited_for() -> None:
    _judge(_sign(0, **WAITING), processes=2)


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ([_sign(0, **STUCK)], "process 0 of 1 has been stuck for 60 seconds: training, here0"),
        ([_sign(0, **WAITING), _sign(1, **STUCK)], "process 1 of 2 has been stuck for 60 seconds: training, here1"),
        (
            [_sign(0, **STUCK), _sign(1, silent=61.0)],
            "process 1 of 2 has not run for 60 seconds: training, here1",
        ),
        ([_sign(0, **WAITING)], "process 0 of 1 has been stuck for 60 seconds: training, here0"),
        (
            [_sign(0, **WAITING), _sign(1, **WAITING)],
            "all processes are waiting for each other or for their GPUs\n  process 0: training, here0",
        ),
    ],
    ids=["alone", "others wait", "stopped", "alone with its GPU", "all wait"],
)
def test_the_one_that_others_wait_for_is_named(signs: list[ProcessState], expected: str) -> None:
    with pytest.raises(StageError) as caught:
        _judge(*signs)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("stage sft: ")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_a_file_that_goes_while_it_is_read_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A worker that is done removes its folder at any moment, and NFS has a number of its own for a file replaced."""
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "0.json").touch()

    def gone(*_: Any, **__: Any) -> str:
        raise OSError(number, "gone")

    monkeypatch.setattr(Path, "read_text", gone)
    assert Heartbeat.read_all(tmp_path) == {}
    assert Progress.read(tmp_path) is None


def test_heartbeats_are_read_by_rank_and_damaged_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    for rank in (10, 2):
        _beat(tmp_path, at=1.0, rank=rank)
    (tmp_path / "heartbeats/.3.json.99.tmp").write_text("{")
    (tmp_path / "heartbeats/4.json").write_text('{"pid": "seven"}')
    assert list(Heartbeat.read_all(tmp_path)) == [2, 10]
    assert Heartbeat.read_all(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_is_set_makes_no_process_look_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """A worker's own clock and the reader's have nothing in common; only what changes counts."""
    monkeypatch.setattr("time.time", lambda: 1e9 + jump)
    now = 7.0
    watch = Watch(tmp_path, clock=lambda: now)
    _beat(tmp_path, at=5000.0)
    assert [sign.idle for sign in watch.look()] == [0.5]
    now = 70.0
    _beat(tmp_path, at=5000.0 + jump)
    refuse_stuck(watch.look(), processes=1, limit=60, stage="sft")
    now = 131.0
    with pytest.raises(StageError, match="process 0 of 1 has not run"):
        refuse_stuck(watch.look(), processes=1, limit=60, stage="sft")


def test_a_new_process_of_the_same_rank_is_heard_anew(tmp_path: Path) -> None:
    now = 0.0
    watch = Watch(tmp_path, clock=lambda: now)
    _beat(tmp_path, at=5000.0)
    watch.look()
    now = 61.0
    _beat(tmp_path, at=5000.0, pid=2)
    assert [sign.silent for sign in watch.look()] == [0.0]


def _beat(work: Path, *, at: float, pid: int = 1, rank: int = 0) -> None:
    (work / "heartbeats").mkdir(exist_ok=True)
    beat = Heartbeat(pid=pid, phase="training", time=at, since=at - 0.5, waits=False, location="x")
    beat.write(heartbeat_file(work, rank))
