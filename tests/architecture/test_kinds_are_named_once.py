"""A kind of stage is named in its own folder and in the registry, and nowhere else in the package."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.stages.registry import kinds

PACKAGE = Path(__file__).parents[2] / "alignment"
REGISTRY = PACKAGE / "stages" / "registry.py"
ALSO_WORDS = {"reward", "sample", "report", "evaluate", "forgetting", "reward_card", "kto"}
"""Names that are also a field, a file, a format of data, an artifact or a command.

They count where a kind is asked for.
"""


def outside(kind: str) -> list[Path]:
    own = PACKAGE / "stages" / kind
    return [path for path in sorted(PACKAGE.rglob("*.py")) if own not in path.parents and path != REGISTRY]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def names_of_classes(tree: ast.AST) -> set[str]:
    """Every name that is read, imported or taken as an attribute."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


@functools.cache
def words(tree: ast.AST) -> set[str]:
    """Every text in the code; docstrings are sentences, so no kind's name is one."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def compared_with_a_kind(tree: ast.AST) -> Iterator[str]:
    """Texts that stand beside ``kind`` in a comparison or a match, or are keys beside one another as kinds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            "kind" in ast.unparse(side) for side in (node.left, *node.comparators)
        ):
            yield from words(node)
        if isinstance(node, ast.Match) and "kind" in ast.unparse(node.subject):
            yield from words(node)


@pytest.mark.parametrize("kind", kinds())
def test_nothing_else_names_a_kind(kind: str) -> None:
    config = kinds()[kind].config.__name__
    files = []
    for path in outside(kind):
        tree = parsed(path)
        named = config in names_of_classes(tree)
        asked = kind in (compared_with_a_kind(tree) if kind in ALSO_WORDS else words(tree))
        if named or asked:
            files.append(path.relative_to(PACKAGE).as_posix())
    assert files == []


def test_no_module_asks_for_a_class_of_settings() -> None:
    """``isinstance(config, SomeConfig)`` of a stage's settings; groups inside them may be asked for."""
    classes = {kind.config.__name__ for kind in kinds().values()}
    assert all(dataclasses.is_dataclass(kind.config) for kind in kinds().values())
    asked = [
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and names_of_classes(node) & classes
    ]
    assert asked == []


def test_every_kind_has_its_folder() -> None:
    folders = {path.parent.name for path in (PACKAGE / "stages").glob("*/kind.py")}
    assert folders == {name for name, kind in kinds().items() if kind.config.__module__.startswith("alignment.")}


CONVENTIONS = {"__init__", "__main__", "checks", "config", "kind", "run", "trainer", "worker", "verb"}
"""Names that many folders use for the same part of each."""


def test_two_modules_share_a_name_only_by_convention() -> None:
    seen: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem not in CONVENTIONS and path.parent.name != "commands":  # which are named after verbs
            assert path.stem not in seen, f"{path} and {seen[path.stem]}"
            seen[path.stem] = path
