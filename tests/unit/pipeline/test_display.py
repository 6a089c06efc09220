"""What is on a terminal, or in a log, while a run goes on."""

from __future__ import annotations

import re
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment.pipeline.execute.display import announcer, showing
from alignment.pipeline.execute.run_view import RunReader
from tests.running import RunFolder
from tests.terminals import Terminal


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


class Viewed:
    """A console on a terminal."""

    def __init__(self, columns: int) -> None:
        self._file = StringIO()
        self._read = 0
        self.console = Console(file=self._file, width=columns, height=24, force_terminal=True, color_system=None)
        self._terminal = Terminal(columns, translates=True)

    @property
    def terminal(self) -> Terminal:
        """The terminal with all that was written so far."""
        written = self._file.getvalue()
        self._terminal.feed(written[self._read :].encode())
        self._read = len(written)
        return self._terminal

    def narrow(self, columns: int) -> None:
        """The user drags its edge."""
        self.terminal.resize(columns)
        self.console.width = columns


def test_one_view_is_drawn_again_in_its_lines_and_stays_as_it_ends(run: RunFolder) -> None:
    viewed = Viewed(80)
    with showing(viewed.console, RunReader(run.folder)) as display:
        display.poll()
        run.stage("sft", "running")
        run.progress("sft", "training", 3, 6)
        for step in (1, 2, 3):
            run.steps("sft", {"step": step, "seconds": 1.0 * step, "loss": 2.0 - 0.5 * step, "num_tokens": 64 * step})
            display.poll()
        lines = [re.sub(r"  \d+:\d\d left$", "", line) for line in viewed.terminal.lines]  # by the clock
        assert lines == [
            "mine  running, 0 of 4 stages done",
            "▶ sft       training  ━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌  3/6  50%",
            "            loss 0.5  █▅▁  64 tokens/s",
            "· reward    waits for sft",
            "· dpo       waits for sft",
            "· ppo       waits for reward",
        ]
        assert not viewed.terminal.shows_cursor
        run.stage("sft", "done", seconds=6.0)
        run.run(state="waiting")
        display.poll()
    viewed.console.print("after it")
    assert viewed.terminal.lines == [
        "mine  waiting, 1 of 4 stages done",
        "✓ sft       done     6 s  sft-5f0e9b1c",
        "· reward    waits for its turn",
        "· dpo       waits for its turn",
        "· ppo       waits for reward",
        "after it",
    ]
    assert viewed.terminal.shows_cursor


def test_warnings_stay_above_the_view_whatever_prints_them(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    viewed = Viewed(60)
    announcer(viewed.console)("note: before the run")
    with showing(viewed.console, RunReader(run.folder)) as display:
        for number in range(3):
            display.note(f"warning {number}")
            display.poll()
        print("printed by a library")
        display.poll()
    lines = viewed.terminal.lines
    assert lines[:6] == [
        "  note: before the run",
        "  warning 0",
        "  warning 1",
        "  warning 2",
        "printed by a library",
        "mine  running, 0 of 4 stages done",
    ]
    assert len(lines) == 10
    assert capsys.readouterr().out == ""


def test_a_view_that_becomes_narrower_hides_nothing_that_was_printed(run: RunFolder) -> None:
    viewed = Viewed(110)
    run.stage("sft", "running")
    run.progress("sft", "training", 3, 6, loss=0.5)
    with showing(viewed.console, RunReader(run.folder)) as display:
        display.note("a warning")
        display.poll()
        viewed.narrow(40)
        display.poll()
    assert viewed.terminal.lines == [
        "  a warning",
        "mine  running, 0 of 4 stages done",
        "▶ sft       training  3/6  50%",
        "            loss 0.5",
        "· reward    waits for sft",
        "· dpo       waits for sft",
        "· ppo       waits for reward",
    ]


def test_an_error_leaves_the_terminal_as_it_was(run: RunFolder) -> None:
    viewed = Viewed(80)
    with suppress(ZeroDivisionError), showing(viewed.console, RunReader(run.folder)) as display:
        display.poll()
        raise ZeroDivisionError
    assert viewed.terminal.shows_cursor
    assert viewed.terminal.cursor == (0, 5)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_and_a_terminal_that_cannot_move_its_cursor_get_lines(run: RunFolder, *, terminal: bool) -> None:
    screen = StringIO()
    environment = {"TERM": "dumb"}
    console = Console(file=screen, width=80, force_terminal=terminal, _environ=environment)
    with showing(console, RunReader(run.folder)) as display:
        run.stage("sft", "running")
        run.progress("sft", "training", 3, 6, loss=0.5)
        for _ in range(3):
            display.poll()
        run.stage("sft", "failed", seconds=2.0)
        display.wait("dpo", "job 12 PENDING (Resources)")
        display.poll()
    assert screen.getvalue().splitlines() == [
        "sft: starts (no result yet)",
        "sft: training 3/6  loss 0.5",
        "sft: failed  2 s",
        "dpo: job 12 PENDING (Resources)",
    ]
