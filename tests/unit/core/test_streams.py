"""Output that nobody reads any more changes nothing but what is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from alignment.core.streams import Unfailing

ROOT = Path(__file__).parents[3]


def test_what_a_closed_pipe_does_not_take_is_dropped() -> None:
    code = (
        "import os, sys\nfrom alignment.core.streams import Unfailing, make_unfailing\n"
        "make_unfailing()\n"
        "for number in range(20000): print('line', number)\n"
        "sys.stderr.write(f'{sys.stdout.lost} {sys.stderr.lost}')\n"
    )
    assert _unread([sys.executable, "-c", code]) == (0, "True False")


@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["doctor", "data/quickstart/preferences.jsonl"]])
def test_a_command_ends_as_it_would_where_nobody_reads_it(arguments: list[str]) -> None:
    assert _unread([sys.executable, "-m", "alignment.cli", *arguments]) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_characters_that_the_terminal_lacks_are_printed_as_numbers(encoding: str) -> None:
    argv = [sys.executable, "-c", "from alignment.core.streams import make_unfailing; make_unfailing(); print('a – b')"]
    process = subprocess.run(argv, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, cwd=ROOT)
    assert (process.returncode, process.stdout) == (0, b"a \\u2013 b\n")


def _unread(argv: Sequence[str]) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout is a pipe without a reader."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(), errors


def test_a_stream_that_works_is_left_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        stream = Unfailing(file)
        stream.writelines(["a", "b"])
        assert (stream.write("cd"), stream.lost, stream.encoding) == (2, False, "utf-8")
    assert (tmp_path / "log").read_text() == "abcd"


def test_a_log_whose_disk_was_full_for_a_moment_goes_on(tmp_path: Path) -> None:
    code = (
        "import resource\nfrom alignment.core.streams import make_unfailing\n"
        "make_unfailing()\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))\n"
        "for number in range(2000): print('line', number)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "print('the last word')\n"
    )
    log = tmp_path / "log.txt"
    with log.open("wb") as sink:
        done = subprocess.run([sys.executable, "-c", code], stdout=sink, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert log.read_text().startswith("line 0\nline 1\n")
    assert log.read_text().endswith("the last word\n")
