"""The command lines in blocks of the languages bash and console, and what a console block says that they print."""

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
        """The first word, without its folder."""
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
