"""Which settings exist, by their dotted paths, and their defaults: of a run, and of every kind of stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

from alignment.config.run import RunConfig
from alignment.config.sweep import SweepConfig
from alignment.config.typed import field_types, group_of, kinds_of, listed_dataclass
from alignment.stages.registry import config_classes

MISSING = object()
"""The default of a setting that has none."""


@cache
def defaults() -> dict[str, list[Any]]:
    """Every path with its defaults; several where the setting depends on a kind, as ``launch.backend.num_machines``.

    Stages are called by their kinds: ``stages.dpo.beta``. Settings inside lists follow the list: ``scorers.weight``.
    """
    by_path: dict[str, list[Any]] = {}
    for path, _, default in _every():
        by_path.setdefault(path, []).append(default)
    return by_path


@cache
def choices() -> dict[str, list[str]]:
    """The values of each setting that has a fixed list of them."""
    return {path: [str(value.value) for value in hint] for path, hint, _ in _every() if _is_enum(hint)}


def _every() -> Iterator[tuple[str, Any, Any]]:
    yield from _below(RunConfig, RunConfig(name="run"), "")
    for kind, cls in config_classes().items():
        yield from _below(cls, cls(), f"stages.{kind}.")
    yield from _below(SweepConfig, SweepConfig(), "sweep.")


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


@cache
def ending_in(path: str) -> list[str]:
    """The full paths that are this path or end in it."""
    return [known for known in defaults() if known == path or known.endswith(f".{path}")]


def _below(cls: type, instance: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, hint in field_types(cls).items():
        value = getattr(instance, name, MISSING) if instance is not None else MISSING
        yield f"{prefix}{name}", hint, value.value if isinstance(value, Enum) else value
        inner = [cls_inside for cls_inside in (group_of(hint), listed_dataclass(hint)) if cls_inside is not None]
        for cls_inside in (*inner, *kinds_of(hint).values()):
            own = value if type(value) is cls_inside else _made(cls_inside)
            yield from _below(cls_inside, own, f"{prefix}{name}.")


def _made(cls: type) -> Any:
    required = [field for field in dataclasses.fields(cls) if _is_required(field)]
    return None if required else cls()


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
