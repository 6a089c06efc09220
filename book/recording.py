"""Records commands of a terminal as an animated SVG: ``python -m book.recording docs/session.svg 'align plan …' …``.

Each command runs in a pseudo-terminal. Its lines appear in the order in which they were printed; waiting is shortened.
What a progress line showed before its last state is left out. The picture scrolls like a terminal of ``ROWS`` lines.
Readers who prefer no motion see its end.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from html import escape
from pathlib import Path

COLUMNS, ROWS = 112, 34
LINE_HEIGHT, CHARACTER = 18, 7.8
SECONDS_A_LINE, SECONDS_A_COMMAND = 0.15, 1.5
_CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])")


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
    return [line.rstrip() for line in shown(printed.decode()) if line.strip()]


def shown(printed: str) -> list[str]:
    """The lines that a terminal shows after all of this; those that were drawn over are not among them."""
    lines, row, from_start = [""], 0, False
    for part in _CONTROL.split(printed):
        if part == "\n":
            row, from_start = row + 1, False
            lines += [""] * (row == len(lines))
        elif part == "\r":
            from_start = True
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[row] = ""
        elif part and not part.startswith("\x1b"):
            lines[row] = part if from_start else lines[row] + part
            from_start = False
    return lines


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
    width, height = 2 * 16 + COLUMNS * CHARACTER, 2 * 16 + min(ROWS, len(rows)) * LINE_HEIGHT
    scrolled = "".join(
        f"{100 * appears / (seconds + 1):.2f}%{{transform:translateY({-LINE_HEIGHT * (index + 1 - ROWS)}px)}}"
        for index, (appears, _, _) in enumerate(rows)
        if index >= ROWS
    )
    last = -LINE_HEIGHT * max(0, len(rows) - ROWS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-size="13" '
        'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace">',
        "<style>text{fill:#d0d7de;white-space:pre;animation:appear .01s both}.command{fill:#7ee787}"
        f"g{{animation:scroll {seconds + 1:.2f}s step-end both}}@keyframes appear{{from{{opacity:0}}}}"
        f"@keyframes scroll{{0%{{transform:none}}{scrolled}100%{{transform:translateY({last}px)}}}}"
        "@media(prefers-reduced-motion){text,g{animation-delay:0s!important;animation-duration:.01s}}</style>",
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#0d1117"/>',
        "<g>",
    ]
    for index, (appears, kind, text) in enumerate(rows):
        y = 16 + (index + 0.75) * LINE_HEIGHT
        parts.append(
            f'<text class="{kind}" x="16" y="{y:.0f}" xml:space="preserve" style="animation-delay:{appears:.2f}s">'
            f"{escape(text)}</text>"
        )
    parts += ["</g>", f'<rect width="{width:.0f}" height="16" rx="8" fill="#0d1117"/>', "</svg>", ""]
    return "\n".join(parts)


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
