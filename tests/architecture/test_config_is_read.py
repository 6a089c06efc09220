"""Every setting is read somewhere: a field that nothing reads is a promise that nothing keeps."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from alignment.config.launch import LaunchConfig
from alignment.config.model import ModelConfig
from alignment.config.run import RunConfig
from alignment.config.stage import STAGES
from alignment.config.sweep import SweepConfig
from alignment.config.tracking import TrackingConfig
from alignment.config.typed import field_types, listed_dataclass

PACKAGE = Path(__file__).parents[2] / "alignment"
GENERIC = {"kind"}
"""Read by ``typed`` to choose a dataclass, which is all that it is for in a stage."""


def classes() -> list[type]:
    """Every configuration dataclass, found from the run and its stages."""
    found: list[type] = []
    todo: list[Any] = [RunConfig, ModelConfig, LaunchConfig, TrackingConfig, SweepConfig, *STAGES.values()]
    while todo:
        cls = todo.pop(0)
        if cls not in found:
            found.append(cls)
            hints = [listed_dataclass(hint) or hint for hint in field_types(cls).values()]
            todo += [hint for hint in hints if dataclasses.is_dataclass(hint)]
    return found


def attributes_read(files: list[Path]) -> set[str]:
    """Names that stand after a dot in an expression that is read."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def readers(cls: type) -> list[Path]:
    """Where a class's fields may be read: a stage's in what it runs, the others anywhere outside config/."""
    everywhere = [path for path in PACKAGE.rglob("*.py") if "config" not in path.relative_to(PACKAGE).parts]
    if cls not in STAGES.values():
        return everywhere
    return [path for path in everywhere if cls.__name__ in path.read_text(encoding="utf-8")]


REFERENCES = {
    (cls, field.name) for cls in STAGES.values() for field in dataclasses.fields(cls) if "reference" in field.metadata
}


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_field_is_read(cls: type) -> None:
    read = attributes_read(readers(cls))
    unread = [
        name for name in field_types(cls) if name not in read and name not in GENERIC and (cls, name) not in REFERENCES
    ]
    assert not unread


@pytest.mark.parametrize(
    ("cls", "name"), sorted(REFERENCES, key=str), ids=lambda value: getattr(value, "__name__", value)
)
def test_every_reference_is_read_by_its_stage(cls: type, name: str) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in readers(cls))
    if name != "evaluation":  # the report finds its evaluation through run.json, by the reference that stands there
        forms = (f'inputs["{name}"]', f'inputs.get("{name}")', f"spec.{name}", f"{name}ial_policy(")
        assert any(form in text for form in forms)
