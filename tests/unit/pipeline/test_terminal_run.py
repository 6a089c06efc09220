"""A run on a real terminal: its view follows the size of the window, and Ctrl-C leaves a clean screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.terminals import Terminal

ROOT = Path(__file__).parents[3]
SECONDS = 60.0


class RealTerminal:
    """A pseudo-terminal, and the program that it controls."""

    def __init__(self, argv: list[str], columns: int) -> None:
        self._end, program_end = pty.openpty()
        self.terminal = Terminal(columns)
        self.resize(columns)
        self.settings = termios.tcgetattr(program_end)
        self.process = subprocess.Popen(
            argv,
            stdin=program_end,
            stdout=program_end,
            stderr=program_end,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._program_end = program_end

    def resize(self, columns: int) -> None:
        """The user changes the window."""
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.terminal.resize(columns)

    def press(self, key: bytes) -> None:
        """The user presses a key."""
        os.write(self._end, key)

    def read_until(self, is_enough: Callable[[], bool]) -> None:
        """Feeds the terminal until it shows what is awaited."""
        deadline = time.monotonic() + SECONDS
        while not is_enough():
            assert time.monotonic() < deadline, "\n".join(self.terminal.lines)
            if select.select([self._end], [], [], 0.1)[0]:
                self.terminal.feed(os.read(self._end, 65536))

    def settings_now(self) -> list[object]:
        """Echo, line mode and the like."""
        return termios.tcgetattr(self._program_end)

    def close(self) -> None:
        """Ends the program if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._end)
        os.close(self._program_end)


@contextmanager
def on_a_terminal(argv: list[str], columns: int) -> Iterator[RealTerminal]:
    """Starts a program on a terminal, which is closed at the end of the block."""
    real = RealTerminal(argv, columns)
    try:
        yield real
    finally:
        real.close()


def test_a_run_is_drawn_in_place_and_ctrl_c_leaves_a_clean_terminal(
    overrides: list[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "reward:hang")
    hanging = tmp_path / "out/runs/quickstart/reward/hanging"
    script = str(Path(__file__).with_name("terminal_run.py"))
    with on_a_terminal([sys.executable, script, *overrides], columns=100) as real:
        shown = real.terminal

        def line_of(stage: str) -> str:
            lines = [line for line in shown.lines if line[2:].startswith(f"{stage} ")]
            assert len(lines) < 2, "the view is drawn in place"
            return lines[0] if lines else ""

        real.read_until(
            lambda: (
                line_of("reward").startswith("▶")
                and line_of("sft").startswith("✓ sft       done")
                and line_of("ppo") == "· ppo       waits for reward"
            )
        )
        assert not shown.shows_cursor
        real.resize(50)
        real.read_until(lambda: "evaluate" in line_of("report"))
        real.read_until(hanging.exists)  # before its worker runs, a stage has nothing to finish or to save
        real.press(b"\x03")
        real.read_until(lambda: real.process.poll() is not None)
        real.read_until(lambda: "stopped; run the same" in "".join(shown.lines[-2:]))
        assert real.process.returncode == 130
        assert any("stopping: the stage will finish its step" in line for line in shown.lines)
        assert line_of("reward").startswith("– reward    stopped")
        assert shown.shows_cursor
        assert shown.cursor == (0, len(shown.lines))
        assert real.settings_now() == real.settings
