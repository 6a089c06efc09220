"""Whatever rows, answers, file names and errors say is shown, and never obeyed by the terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from alignment.cli import main
from alignment.core.errors import DataError
from alignment.core.terminal import Terminal, complain, visible

ROOT = Path(__file__).parents[3]
ATTACKS = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a\rb",
    "\x9b2J",
    "\u202eabc\u2066",
    "\x08\x7f",
    "\x1b]52;c;AAAA\x1b\\",
    "\ud800",
]
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and cursor of rich itself."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_terminal_would_obey_is_written_out(attack: str) -> None:
    shown = visible(f"before {attack} after\tand\nmore [bold]")
    assert not OBEYED.search(shown)
    assert shown.startswith("before ")
    assert shown.endswith(" after\tand\nmore [bold]")
    assert visible("\x1b[1m \x9b \u202e") == r"\x1b[1m \x9b \u202e"


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


def test_rows_cannot_command_the_terminal_of_the_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"prompt": 7, "\x1b[2Jcompletion": "\x1b[2J", "completion": "\x1b]0;title\x07"}
    (tmp_path / "a\x1b[2J.jsonl").write_text(f"{json.dumps(hostile)}\n{json.dumps(hostile)}\n")
    assert main(["doctor", str(tmp_path / "a\x1b[2J.jsonl")]) == 3
    printed = capsys.readouterr()
    assert not OBEYED.search(printed.out + printed.err)
    assert r"\x1b[2Jcompletion" in printed.out


def test_an_error_cannot_either(capsys: pytest.CaptureFixture[str]) -> None:
    complain(DataError("'completion' is '\x1b[2J'", where="a\x1b[2J:1", remedy="\x9b"))
    assert capsys.readouterr().err == "data: a\\x1b[2J:1: 'completion' is '\\x1b[2J'\n  → \\x9b\n"


def test_no_code_prints_past_it() -> None:
    """A console of rich's own would obey; so would a bare print of what somebody wrote."""
    assert issubclass(Terminal, Console)
    allowed = {"alignment/core/terminal.py"}
    for path in (ROOT / "alignment").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        assert name in allowed or not re.search(r"(?<!\w)Console\(", path.read_text(encoding="utf-8")), name
