"""The command lines in blocks of bash and console, and whether they print what a block says that they print."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.documented.blocks import Block

_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command: its words, without variables before them and the comment behind them, and its quoted output."""

    line: int
    words: list[str]
    output: str = ""

    @property
    def program(self) -> str:
        return self.words[0].rpartition("/")[2]


def commands(block: Block) -> list[Command]:
    """The commands of a block. In a console block they stand behind ``$``, and other lines are output."""
    lines = block.text.splitlines()
    if block.language == "bash":
        return [_command(block, number, text) for number, text in _joined(lines) if text.split("#")[0].strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    assert starts[:1] == [0], f"{block.id}: a console block begins with a command behind '$ '"
    return [
        _command(block, first, lines[first].removeprefix("$ "), "\n".join(lines[first + 1 : last]))
        for first, last in zip(starts, [*starts[1:], len(lines)], strict=True)
    ]


def _command(block: Block, number: int, text: str, output: str = "") -> Command:
    words = shlex.split(text, comments=True)
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    return Command(line=block.line + 1 + number, words=words, output=output)


def _joined(lines: list[str]) -> list[tuple[int, str]]:
    """Numbered lines, those that end in a backslash with the next one."""
    joined: list[tuple[int, str]] = []
    goes_on = False
    for number, line in enumerate(lines):
        if goes_on:
            joined[-1] = (joined[-1][0], joined[-1][1] + " " + line.removesuffix("\\"))
        else:
            joined.append((number, line.removesuffix("\\")))
        goes_on = line.endswith("\\")
    return joined


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
