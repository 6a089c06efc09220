"""Nothing below ``stages`` takes a stage's settings: it takes plain values, or a small record of its own. Groups of
settings that several kinds share (``alignment.config.scoring``, ``….adapter``) are plain values here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.stages.registry import kinds

PACKAGE = Path(__file__).parents[2] / "alignment"
CLASSES = {kind.config.__name__ for kind in kinds().values()}


def settings_taken(tree: ast.AST) -> Iterator[str]:
    """Every line that imports, names or reads a stage's settings; each has a ``kind``, which may be read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("alignment.config.stage", "alignment.stages")
        ):
            yield f"line {node.lineno}: imports from {node.module}"
        if isinstance(node, ast.Name) and node.id in CLASSES:
            yield f"line {node.lineno}: names {node.id}"
        if isinstance(node, ast.arg) and node.arg == "config" and node.annotation is not None:
            annotation = ast.unparse(node.annotation).strip("'")
            if annotation in ("Any", "object", *CLASSES):
                yield f"line {node.lineno}: takes settings of a stage"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("spec.config") and node.attr != "kind":
            yield f"line {node.lineno}: reads {ast.unparse(node)}"
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node).startswith("getattr(")
            and "spec.config," in ast.unparse(node)
        ):
            yield f"line {node.lineno}: reads {ast.unparse(node)}"


@pytest.mark.parametrize("room", ["training", "rewards", "models", "algos", "data", "evaluation"])
def test_no_module_below_the_stages_takes_a_stages_settings(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    taken = [(file.name, list(settings_taken(ast.parse(file.read_text(encoding="utf-8"))))) for file in files]
    assert [uses for uses in taken if uses[1]] == []
