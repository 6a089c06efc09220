"""Names say what they hold, in the terms of the field: in the package, its tests, the benchmarks and the book. A
pronoun or a participle, such as ``theirs`` or ``found``, could name anything; so could ``place``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("alignment", "benchmarks", "book", "tests")
EMPTY = frozenset({"one", "ones", "what", "of_what"})
"""Not to be used as a whole name."""
VAGUE = frozenset({"found", "told", "said", "kept", "place", "places", "thing", "things", "theirs", "mine"})
"""Not even as a word of a name."""
PRIVATE = frozenset({"pulse", "price", "voice", "voices", "manner", "handover", "laid"})
"""Words of our own: heartbeat, coefficient, chat session, generation option, worker protocol and
prepacked are the field's."""


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that a module defines, with their lines: variables, parameters, attributes, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.alias(asname=str(name)):
                yield node.lineno, name


def says_nothing(name: str) -> bool:
    """Whether a name, in either spelling, is empty or holds a word that it must not hold. The name of a test is a
    sentence, in which ``found`` says what happens."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    refused = PRIVATE if words.startswith("test_") else VAGUE | PRIVATE
    return words in EMPTY or not refused.isdisjoint(words.split("_"))


def offences(files: list[Path]) -> list[str]:
    """``alignment/training/start.py:12 found`` for every name of these files that says nothing."""
    names = {
        (file.relative_to(ROOT).as_posix(), line, name)
        for file in files
        for line, name in [(1, file.stem), *defined(ast.parse(file.read_text(encoding="utf-8")))]
    }
    return [f"{file}:{line} {name}" for file, line, name in sorted(names) if says_nothing(name)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_say_what_they_hold(folder: str) -> None:
    files = sorted(file for file in (ROOT / folder).rglob("*.py") if ".environments" not in file.parts)
    assert len(files) > {"alignment": 300, "benchmarks": 30, "book": 10, "tests": 200}[folder]
    assert offences(files) == []
