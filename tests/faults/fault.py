"""A deliberate fault, and where it belongs in the source: a function and an expression in it, not a line of text."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("faults.jsonl")


class Stale(Exception):
    """The source has no such expression any more, or several; the fault has to be planted anew, or goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """In ``function`` (``Class.method``; empty: beside all functions) the code ``old`` becomes ``new``.

    ``old`` is compared as ``ast.unparse`` writes it, so layout and comments do not count. ``file`` is where it was
    drawn; if that file has no such function, all of the package is searched. ``tests`` is a file of tests, or a folder,
    that is likely to notice it.
    """

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: str

    def apply(self, root: Path) -> tuple[Path, str]:
        """Puts the fault into the tree at ``root``; returns the file and its text before.

        Raises:
            Stale: no file has the expression exactly once in this function.
        """
        moved = sorted((root / "alignment").rglob("*.py")) if self.function else []
        for path in [root / self.file, *moved]:
            if path.is_file() and len(spans := list(self._spans(text := path.read_text(encoding="utf-8")))) == 1:
                start, end = spans[0]
                encoded = text.encode()
                path.write_bytes(encoded[:start] + self._indented(encoded, start) + encoded[end:])
                return path, text
        raise Stale(f"{self.name}: {self.function or self.file} has no single {self.old!r}")

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where the expression is, in bytes."""
        if self.function and f"{self.function.rpartition('.')[2]}" not in text:
            return
        tree: ast.AST = ast.parse(text)
        for name in filter(None, self.function.split(".")):
            named = [node for node in ast.walk(tree) if getattr(node, "name", None) == name and node is not tree]
            if not named:
                return
            tree = named[0]
        starts = [0]
        for line in text.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        kind = _kind(self.old)
        for node in ast.walk(tree):
            is_candidate = isinstance(node, ast.expr | ast.stmt | ast.keyword | ast.comprehension | ast.ExceptHandler)
            if is_candidate and node is not tree and isinstance(node, kind) and ast.unparse(node) == self.old:
                assert node.end_lineno is not None
                assert node.end_col_offset is not None
                yield starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def _indented(self, encoded: bytes, start: int) -> bytes:
        """The new code; lines after the first have the depth of the one that they follow."""
        depth = start - (encoded.rfind(b"\n", 0, start) + 1)
        is_first = not encoded[start - depth : start].strip()
        return self.new.replace("\n", "\n" + " " * depth if is_first else "\n").encode()


def _kind(code: str) -> type[ast.AST] | tuple[type[ast.AST], ...]:
    """An expression that is a whole statement too has one place, not two."""
    try:
        ast.parse(code, mode="eval")
    except SyntaxError:
        return (ast.stmt, ast.keyword, ast.comprehension, ast.ExceptHandler)
    return ast.expr


def table() -> list[Fault]:
    """All faults, in the order in which they were drawn."""
    return [Fault(**json.loads(line)) for line in TABLE.read_text(encoding="utf-8").splitlines()]
