"""Whether a command prints what the documentation says that it prints."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\d[\d,]*(\.\d+)?([eE][+-]?\d+)?|(?<![\w.])\.\d+")
_PATH = re.compile(r"(?<![\w/])(~|\.{1,2})?(/[\w.@+-]+)+/?")
_HASH = re.compile(r"\b[0-9a-f]{8,}\b")
ANYTHING = "…"
"""Where a quoted line ends in this, the printed one may go on; a line that is only this stands for any lines."""


def same_output(quoted: str, printed: str, *, differs: bool) -> bool:
    """Whether the lines are the same, without spaces at their ends; with ``differs`` numbers, hashes and paths, which
    are others elsewhere, are not compared."""
    wanted, got = (_lines(text, differs=differs) for text in (quoted, printed))
    return _fits(wanted, got)


def _fits(wanted: list[str], got: list[str]) -> bool:
    if not wanted:
        return not got
    if wanted[0] == ANYTHING:
        return any(_fits(wanted[1:], got[start:]) for start in range(len(got) + 1))
    return bool(got) and _is_line(wanted[0], got[0]) and _fits(wanted[1:], got[1:])


def _is_line(wanted: str, got: str) -> bool:
    beginning, dots, end = wanted.partition(ANYTHING)
    if dots and ANYTHING not in got:
        return got.startswith(beginning) and got.endswith(end) and len(got) >= len(beginning) + len(end)
    return wanted == got


def _lines(text: str, *, differs: bool) -> list[str]:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return [_NUMBER.sub("N", _HASH.sub("N", _PATH.sub("PATH", line))) for line in lines] if differs else lines
