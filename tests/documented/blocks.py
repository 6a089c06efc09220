"""The fenced blocks of the documentation, and the comments before them that say how they are checked.

A block is executed or checked as it stands, unless a comment directly before its fence says more. A comment is one of::

    <!-- needs: run -->                      not executed here, because of NEEDS; its commands are still parsed
    <!-- in: stages.ppo -->                  a fragment of a recipe: where it belongs
    <!-- on: grpo -->                        and which recipe it changes, if that is not the quickstart
    <!-- with: stages.x.y=1 -->              settings on which the example relies, as on the command line
    <!-- file: score.py -->                  the reader saves the block under this name
    <!-- output differs -->                  a quoted output, of which numbers and paths are not compared
    <!-- checked by: tests/unit/test_x.py -->  this file compares or executes the block
    <!-- drawing -->                         no code

``settings:`` stands before a table (``tests/documented/tables.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")}
    - {ROOT / "docs/LOG.md"}
)
"""The pages that say how things are. Design pages and the log say how they were decided, and are history."""

NEEDS = {
    "run": "results of a run, or weights; tests/e2e/test_documented_commands.py has them and executes the block",
    "person": "somebody at the keyboard, or Ctrl-C",
    "model": "the weights of a model, and minutes",
    "network": "downloads",
    "engine": "an environment with vLLM or llama.cpp",
    "program": "a program of others: ollama, llama-server, wandb, tensorboard",
}
"""Why a block is not executed by the tests of this folder."""
_KEYS = ("needs", "in", "on", "with", "file", "checked by", "settings")
_FLAGS = ("output differs", "drawing")
_COMMENT = re.compile(r"<!-- (.*?) -->")
_FENCE = re.compile(r"^( *)```(\S*)$")


class BadComment(Exception):
    """A comment that says nothing that is known here, or stands before nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block: the page relative to the root, the line of its first fence, and what the comments before it say.
    Example: ``Block(page="docs/running.md", line=3, language="bash", text="align run quickstart", comments={})``."""

    page: str
    line: int
    language: str
    text: str
    comments: Mapping[str, str]

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> list[str]:
        return [need.strip() for need in self.comments.get("needs", "").split(",") if need.strip()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A piece of code inside prose or a table, without its backticks."""

    page: str
    line: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line} {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table: its first row, the other rows, each as cells, and what ``settings:`` before it says, if anything."""

    page: str
    line: int
    head: list[str]
    rows: list[list[str]]
    settings: str | None

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page, in order. Raises BadComment: a comment before a block says nothing that is known."""
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    page_blocks = []
    for first, last, indent, language in _fences(lines):
        inner = [line.removeprefix(indent) for line in lines[first + 1 : last]]
        block = Block(
            page=name_of(page),
            line=first + 1,
            language=language,
            text="\n".join(inner) + "\n",
            comments=dict(_comments_above(lines, first, page)),
        )
        if unknown := set(block.needs) - set(NEEDS):
            raise BadComment(f"{block.id} needs {', '.join(sorted(unknown))}; known: {', '.join(NEEDS)}")
        page_blocks.append(block)
    return page_blocks


def all_blocks() -> list[Block]:
    """Those of all pages, and the commands of design pages."""
    of_design = [block for page in sorted((ROOT / "docs/design").glob("*.md")) for block in blocks(page)]
    return [block for page in PAGES for block in blocks(page)] + [
        block for block in of_design if block.language == "bash"
    ]


def spans(page: Path) -> Iterator[Span]:
    for number, line in prose(page):
        for match in re.finditer(r"(`+)(.+?)\1", line):
            yield Span(page=name_of(page), line=number, text=match[2].strip())


def tables(page: Path) -> list[Table]:
    numbered = prose(page)
    lines = dict(numbered)
    page_tables, taken = [], set[int]()
    for number, line in numbered:
        if number in taken or not line.startswith("|") or not re.match(r"\|[ :|-]+\|$", lines.get(number + 1, "")):
            continue
        rows, last = [], number + 2
        while lines.get(last, "").startswith("|"):
            rows.append(_cells(lines[last]))
            last += 1
        taken.update(range(number, last))
        above = list(page.read_text(encoding="utf-8").splitlines())
        comments = dict(_comments_above(above, number - 1, page))
        page_tables.append(
            Table(page=name_of(page), line=number, head=_cells(line), rows=rows, settings=comments.get("settings"))
        )
    return page_tables


def stray_comments(page: Path) -> list[str]:
    """Comments of this folder's forms that stand before neither a block nor a table, by line."""
    lines = page.read_text(encoding="utf-8").splitlines()
    starts = {first for first, *_ in _fences(lines)} | {table.line - 1 for table in tables(page)}
    stray = []
    for number, line in enumerate(lines):
        match = _COMMENT.fullmatch(line.strip())
        if match is None or _parsed(match[1]) is None:
            continue
        below = number
        while below < len(lines) and (not lines[below].strip() or _COMMENT.fullmatch(lines[below].strip())):
            below += 1
        if below not in starts:
            stray.append(f"{name_of(page)}:{number + 1} {line}")
    return stray


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def _fences(lines: list[str]) -> Iterator[tuple[int, int, str, str]]:
    """First and last line (from 0) of each block, its indentation and its language."""
    opened: tuple[int, str, str] | None = None
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if match is None:
            continue
        if opened is None:
            opened = (number, match[1], match[2])
        else:
            yield opened[0], number, opened[1], opened[2]
            opened = None
    assert opened is None, f"a block that opens in line {opened[0] + 1 if opened else 0} is never closed"


def _comments_above(lines: list[str], start: int, page: Path) -> Iterator[tuple[str, str]]:
    number = start - 1
    while number >= 0 and (not lines[number].strip() or _COMMENT.fullmatch(lines[number].strip())):
        if match := _COMMENT.fullmatch(lines[number].strip()):
            parsed = _parsed(match[1])
            if parsed is None:
                raise BadComment(f"{name_of(page)}:{number + 1} says {match[1]!r}; known: {(*_KEYS, *_FLAGS)}")
            yield parsed
        number -= 1


def _parsed(text: str) -> tuple[str, str] | None:
    if text in _FLAGS:
        return text, ""
    key, colon, value = text.partition(": ")
    return (key, value) if colon and key in _KEYS else None


def prose(page: Path) -> list[tuple[int, str]]:
    lines = page.read_text(encoding="utf-8").splitlines()
    inside = {number for first, last, *_ in _fences(lines) for number in range(first, last + 1)}
    return [(number + 1, line) for number, line in enumerate(lines) if number not in inside]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
