"""Records commands of a terminal as an animated SVG: ``python -m book.recording docs/session.svg 'align plan …' …``.

Each command runs in a pseudo-terminal. Its lines appear in the order in which they were printed; waiting is shortened.
What a progress line showed before its last state is left out. Readers who prefer no motion see all lines at once.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from html import escape
from pathlib import Path

COLUMNS = 112
LINE_HEIGHT, CHARACTER = 18, 7.8
SECONDS_A_LINE, SECONDS_A_COMMAND = 0.15, 1.5
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def output_of(command: str) -> list[str]:
    """The lines that a terminal of ``COLUMNS`` columns shows in the end.

    Raises:
        RuntimeError: the command failed.
    """
    controller, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm"}
    with subprocess.Popen(["bash", "-c", command], stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        printed = b""
        while block := _read(controller):
            printed += block
    os.close(controller)
    if process.returncode != 0:
        raise RuntimeError(f"{command}: exit status {process.returncode}\n{printed.decode(errors='replace')}")
    lines = _CONTROL.sub("", printed.decode()).replace("\r\n", "\n").split("\n")
    return [line.split("\r")[-1].rstrip() for line in lines if line.split("\r")[-1].strip()]


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 65536)
    except OSError:  # Linux reports the end of a pseudo-terminal as an error
        return b""


def drawing(session: list[tuple[str, list[str]]]) -> str:
    """The SVG of commands and their lines."""
    rows: list[tuple[float, str, str]] = []
    seconds = 0.0
    for command, lines in session:
        seconds += SECONDS_A_COMMAND
        rows.append((seconds, "command", f"$ {command}"))
        for line in lines:
            seconds += SECONDS_A_LINE
            rows += [(seconds, "line", part) for part in _wrapped(line)]
    width, height = 2 * 16 + COLUMNS * CHARACTER, 2 * 16 + len(rows) * LINE_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-size="13" '
        'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace">',
        "<style>text{fill:#d0d7de;white-space:pre;animation:appear .01s both}.command{fill:#7ee787}"
        "@keyframes appear{from{opacity:0}}@media(prefers-reduced-motion){text{animation:none}}</style>",
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#0d1117"/>',
    ]
    for index, (appears, kind, text) in enumerate(rows):
        y = 16 + (index + 0.75) * LINE_HEIGHT
        parts.append(
            f'<text class="{kind}" x="16" y="{y:.0f}" xml:space="preserve" style="animation-delay:{appears:.2f}s">'
            f"{escape(text)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _wrapped(line: str) -> list[str]:
    return [line[start : start + COLUMNS] for start in range(0, len(line), COLUMNS)] or [""]


def main(arguments: list[str]) -> None:
    """Runs the commands and writes the drawing."""
    target, *commands = arguments
    session = [(command, output_of(command)) for command in commands]
    Path(target).write_text(drawing(session), encoding="utf-8")
    print(f"{target}: {sum(len(lines) for _, lines in session)} lines of {len(commands)} commands")


if __name__ == "__main__":
    main(sys.argv[1:])
