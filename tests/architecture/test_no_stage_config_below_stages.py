"""Nothing below ``stages`` takes a stage's settings: it takes plain values, or a small record of its own. Groups of
settings that several kinds share (``alignment.config.scoring``, ``….adapter``) are plain values here."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.stages.registry import kinds

PACKAGE = Path(__file__).parents[2] / "alignment"
BELOW = ("training", "rewards", "models", "algos", "data", "evaluation")
OF_ANY_STAGE = "alignment.config.stage"
"""Protocols that the settings of all stages share."""
FOR_EVERY_STAGE = {"kind"}
"""What every stage's settings have, whatever its kind."""


def classes_of_settings() -> set[str]:
    """Names of all classes that describe a stage's settings: its dataclass, and others that stand beside it."""
    modules = {OF_ANY_STAGE, *(kind.config.__module__ for kind in kinds().values())}
    return {
        name
        for module in modules
        for name, value in inspect.getmembers(importlib.import_module(module), inspect.isclass)
        if value.__module__ == module
    }


def settings_taken(tree: ast.AST, classes: set[str]) -> Iterator[str]:
    """Every place where a module imports, names or reads a stage's settings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith((OF_ANY_STAGE, "alignment.stages")):
            yield f"line {node.lineno}: imports from {node.module}"
        if isinstance(node, ast.Import) and any(alias.name.startswith("alignment.stages") for alias in node.names):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Name | ast.Attribute) and _last_name(node) in classes:
            yield f"line {node.lineno}: names {_last_name(node)}"
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield from _annotation(node, node.annotation, classes)
        if isinstance(node, ast.Attribute) and _is_settings(node.value) and node.attr not in FOR_EVERY_STAGE:
            yield f"line {node.lineno}: reads {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and _is_settings(node.args[0]):
            yield f"line {node.lineno}: reads {ast.unparse(node)}"


def _annotation(argument: ast.arg, annotation: ast.expr, classes: set[str]) -> Iterator[str]:
    """A class in quotes, or settings of a class that is not said."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str) and annotation.value in classes:
        yield f"line {argument.lineno}: names {annotation.value}"
    if argument.arg == "config" and ast.unparse(annotation) in ("Any", "object"):
        yield f"line {argument.lineno}: takes settings of any class"


def _last_name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _is_settings(node: ast.expr) -> bool:
    """Whether this is what ``StageSpec.config`` holds: ``spec.config``, ``context.spec.config``."""
    return ast.unparse(node).endswith("spec.config")


@pytest.mark.parametrize("room", BELOW)
def test_no_module_below_the_stages_takes_a_stages_settings(room: str) -> None:
    classes = classes_of_settings()
    uses = [
        f"{path.relative_to(PACKAGE)}: {use}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for use in settings_taken(ast.parse(path.read_text(encoding="utf-8")), classes)
    ]
    assert uses == []
