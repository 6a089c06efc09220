"""A log keeps its beginning and its end, however much is written to it."""

from __future__ import annotations

import errno
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.core import logs
from alignment.core.logs import begin_attempt, shorten
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.processes import execute


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT", 2000)
    monkeypatch.setattr(logs, "HEAD", 40)
    monkeypatch.setattr(logs, "TAIL", 400)


def test_a_log_within_its_limit_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    shorten(log)
    log.write_bytes(b"x" * 2000)
    shorten(log)
    assert log.read_bytes() == b"x" * 2000


def test_beginning_and_end_of_a_long_log_stay_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("ab", buffering=0) as writer:
        for turn in range(3):
            for number in range(200):
                writer.write(b"line %d of turn %d\n" % (number, turn))
            shorten(log)
            assert log.stat().st_size < 600
        writer.write(b"the last word\n")
    lines = log.read_text().splitlines()
    assert lines[:2] == ["line 0 of turn 0", "line 1 of turn 0"]
    assert lines[-3:] == ["line 198 of turn 2", "line 199 of turn 2", "the last word"]
    assert sum("the middle of this log was left out" in line for line in lines) == 1
    assert lines[lines.index(logs.CUT.decode().strip()) + 1].startswith("line 179 of"), "whole lines"


def test_a_command_that_prints_without_end_does_not_fill_the_disk(tmp_path: Path) -> None:
    code = "print('begun')\nfor number in range(20000): print('again', number)"
    command = Command(argv=(sys.executable, "-c", code), environment={})
    assert execute(command, log=tmp_path / "log.txt", on_poll=lambda: None, grace_seconds=1) == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == "begun"
    assert lines[-1] == "again 19999"
    assert (tmp_path / "log.txt").stat().st_size < 600


def test_a_disk_that_takes_no_more_costs_neither_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(400)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        shorten(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = log.read_bytes().splitlines()
    assert (lines[0], lines[-1]) == (b"line 0", b"line 399")


def test_the_end_of_a_log_of_one_endless_line_stays(tmp_path: Path) -> None:
    """A progress bar returns to the beginning of its line and ends none."""
    log = tmp_path / "log.txt"
    log.write_bytes(b"begun\n" + b"".join(b"\rstep %d" % number for number in range(400)))
    shorten(log)
    assert log.read_bytes().endswith(b"\rstep 398\rstep 399")


def test_an_attempt_whose_log_cannot_be_written_goes_on_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        begin_attempt(log, "attempt 2 at dpo-91c0aa17")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_bytes() == b"x" * 60


def test_a_command_is_not_stopped_because_its_log_cannot_be_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "+" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    command = Command(argv=(sys.executable, "-c", "print('x' * 3000); import time; time.sleep(0.8)"), environment={})
    assert execute(command, log=tmp_path / "log.txt", on_poll=lambda: None, grace_seconds=1) == 0
