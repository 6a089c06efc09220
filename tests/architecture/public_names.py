"""Describes the public API in lines of text: ``python -m tests.architecture.public_names`` records it. A name that
callers use, a parameter, a field, a method or an exit code that changes, changes a line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import alignment

STORAGE = ("write", "read")
"""How records get to and from their files, which ``load_run`` does."""
RECORD = Path(__file__).with_name("public_names.txt")


def lines() -> list[str]:
    """The names in ``alignment.__all__``, then the records that a caller reaches through their fields."""
    public = {name: getattr(alignment, name) for name in alignment.__all__}
    waiting, reached = list(public.values()), dict.fromkeys(public.values())
    while waiting:
        new = [kind for kind in _kinds_in_fields(waiting.pop()) if kind not in reached]
        waiting += new
        reached |= dict.fromkeys(new)
    others = {kind.__name__: kind for kind in reached if kind not in public.values()}
    return [line for names in (public, others) for name in sorted(names) for line in described(name, names[name])]


def _kinds_in_fields(kind: Any) -> list[type]:
    """The dataclasses of this package in the types of a dataclass's fields."""
    if not dataclasses.is_dataclass(kind):
        return []
    kinds: list[type] = []
    waiting = list(get_type_hints(kind).values())
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            kinds.append(hint)
    return kinds


def described(name: str, value: Any) -> Iterator[str]:
    if inspect.isfunction(value):
        yield f"{name}{_signature(value)}"
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {name}({bases})"
    if issubclass(value, Exception):
        yield f"    exit_code = {value.exit_code}"
    elif issubclass(value, Enum):
        yield from (f"    {member.name} = {member.value!r}" for member in value)
    if dataclasses.is_dataclass(value):
        yield from (f"    {field.name}: {field.type}{_default(field)}" for field in dataclasses.fields(value))
    yield from (f"    {line}" for line in _members(value))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return "" if field.default_factory is dataclasses.MISSING else " = …"


def _members(kind: type) -> Iterator[str]:
    """Public methods and properties that the class itself defines."""
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name in STORAGE or (name.startswith("_") and name != "__init__") or not inspect.isfunction(function):
            continue
        if isinstance(member, property):
            yield f"{name} -> {function.__annotations__['return']}"
        elif not (name == "__init__" and dataclasses.is_dataclass(kind)):
            yield f"{name}{_signature(function)}"


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        annotation = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{parameter.name}{annotation}{default}")
    return f"({', '.join(parts)}) -> {signature.return_annotation}"


if __name__ == "__main__":
    RECORD.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
