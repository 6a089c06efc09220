"""What is printed and logged: never obeyed by a terminal, never the end of a run, and never without end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from alignment.cli import main
from alignment.core import deadline, terminal
from alignment.core.errors import DataError, ModelError
from alignment.core.terminal import Terminal, complain, shorten
from alignment.data.records import Prompt
from alignment.data.tokens.row_kinds import PROMPTS, Limits, tokenized
from alignment.data.turns import Message
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[3]

ATTACKS = ["\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202eabc\u2066", "\x08\x7f", "\ud800"]


def test_rows_and_errors_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"prompt": 7, "\x1b[2Jcompletion": "\x1b[2J", "completion": "\x1b]0;title\x07"}
    (tmp_path / "a\x1b[2J.jsonl").write_text(f"{json.dumps(hostile)}\n{json.dumps(hostile)}\n")
    assert main(["doctor", str(tmp_path / "a\x1b[2J.jsonl")]) == 3
    printed = capsys.readouterr()
    assert not OBEYED.search(printed.out + printed.err)
    assert r"\x1b[2Jcompletion" in printed.out
    complain(DataError("'completion' is '\x1b[2J'", where="a\x1b[2J:1", remedy="\x9b"))
    assert capsys.readouterr().err == "data: a\\x1b[2J:1: 'completion' is '\\x1b[2J'\n  → \\x9b\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("LIMIT", 2000), ("HEAD", 40), ("TAIL", 400)):
        monkeypatch.setattr(terminal, name, size)


OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and cursor of rich itself."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_way_to_print_shows_it_and_keeps_its_own_colours(attack: str) -> None:
    table = Table(title=attack)
    table.add_column(attack)
    table.add_row(Text(attack, style="green"))
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, width=200, color_system="standard", legacy_windows=False)
    for renderable in (attack, Text(attack, style="red"), table):
        console.print(renderable, markup=False)
    console.print(f"[bold]{attack}[/]")
    console.rule(attack)
    with Live(Text(attack), console=console, auto_refresh=False) as live:
        live.update(Text(attack), refresh=True)
    assert not OBEYED.search(OWN.sub("", file.getvalue()).replace("\r", ""))
    assert "\x1b[31m" in file.getvalue(), "red is a style here"
    assert "\x1b[1A" in file.getvalue() or "\x1b[2K" in file.getvalue(), "a live line is drawn over"


def test_no_code_prints_past_it() -> None:
    """A console of rich's own would obey; so would a bare print of what somebody wrote."""
    assert issubclass(Terminal, Console)
    allowed = {"alignment/core/terminal.py"}
    for path in (ROOT / "alignment").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        assert name in allowed or not re.search(r"(?<!\w)Console\(", path.read_text(encoding="utf-8")), name


def test_what_a_closed_pipe_does_not_take_is_dropped() -> None:
    code = (
        "import os, sys\nfrom alignment.core.terminal import Unfailing, make_unfailing\n"
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
    argv = [
        sys.executable,
        "-c",
        "from alignment.core.terminal import make_unfailing; make_unfailing(); print('a – b')",
    ]
    process = subprocess.run(argv, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, cwd=ROOT)
    assert (process.returncode, process.stdout) == (0, b"a \\u2013 b\n")


def _unread(argv: Sequence[str]) -> tuple[int, str]:
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(), errors


def test_a_log_whose_disk_was_full_for_a_moment_goes_on(tmp_path: Path) -> None:
    code = (
        "import resource\nfrom alignment.core.terminal import make_unfailing\n"
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


@pytest.mark.usefixtures("small")
def test_beginning_and_end_of_a_long_log_stay_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("ab", buffering=0) as writer:
        shorten(tmp_path / "none")
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
    assert lines[lines.index(terminal.CUT.decode().strip()) + 1].startswith("line 179 of"), "whole lines"


ASKED = (Message(role="user", content="Hi."),)
LOOPS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
OVER_TEXT = (
    "{% macro f(n) %}{% for c in messages[0]['content'] %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
    "{{ f(40) }}"
)


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("template", [LOOPS, OVER_TEXT], ids=["loops over numbers", "loops over the row"])
def test_a_template_that_does_not_end_stops_at_its_first_row(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of a row, which would be counted, and the next row be tried."""
    monkeypatch.setattr(deadline, "SECONDS", 0.05)
    before = signal.getsignal(signal.SIGPROF)
    tokenizer.chat_template = template
    records = [Prompt(messages=ASKED, where=f"rows.jsonl:{number}") for number in (1, 2)]
    with pytest.raises(
        ModelError, match=r"rows.jsonl:1: the chat template ran for more than 10 s for one rendering"
    ) as caught:
        list(tokenized(tokenizer, PROMPTS, records, Limits(row=100)))
    assert "model.chat_template=chatml" in caught.value.remedy
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_runs_in_c_and_hears_of_no_exception_ends_its_process() -> None:
    code = (
        "from alignment.core import deadline; deadline.SECONDS = 0.05; deadline.KILLED_SECONDS = 0.2\n"
        "with deadline.Bounded(ValueError()): sum(range(10**12))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -deadline.KILLED_BY
