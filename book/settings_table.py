"""The section of one dataclass of settings: its docstring, a table of its fields, and what its choices mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, get_args

from alignment.config.rules import rule_of
from alignment.config.run import RunConfig
from alignment.config.typed import field_types, group_of, kinds_of, listed_dataclass, to_plain
from book.markdown import code, own_docstring, prose, table, type_words

Link = Callable[[type], str]
_ARTIFACTS = {"policy": "a policy", "reward": "a reward model", "evaluation": "an evaluation"}


def section(cls: type, *, heading: str, link: Link) -> str:
    """The section; ``link`` makes a link to that of another dataclass."""
    rows = list(_rows(cls, link))
    parts = [heading, own_docstring(cls)]
    parts.append(table(["setting", "default", "values"], rows) if rows else "It has no settings.")
    parts += [f"**`{name}`**: {text}" for name, text in _choices(cls)]
    return "\n\n".join(part for part in parts if part)


def _rows(cls: type, link: Link) -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(cls):
        hint = field_types(cls)[field.name]
        if field.name == "kind" and hint is str:
            continue  # the page says which kind it is
        mark = " °" if field.metadata.get("identity") is False else ""
        yield f"`{field.name}`{mark}", default_words(field, hint), _values(cls, field, hint, link)


def default_words(field: dataclasses.Field[Any], hint: Any) -> str:
    """The default as YAML writes it; of a group, only what differs from the group's own defaults."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    default = default_of(field)
    if dataclasses.is_dataclass(default):
        differing = (f"`{name}: {_yaml(value)}`" for name, value in _differences(default).items())
        own_kind = [f"`kind: {to_plain(default)['kind']}`"] if kinds_of(hint) else []
        return ", ".join([*own_kind, *differing])
    return _listed(default) if isinstance(default, list) and default else code(to_plain(default))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _listed(default: list[Any]) -> str:
    if dataclasses.is_dataclass(default[0]):
        return f"`[{', '.join(_flow(_differences(item)) for item in default)}]`"
    return f"`[{', '.join(map(str, default))}]`"


def _differences(instance: Any) -> dict[str, Any]:
    """Plain values of an instance that differ from its class's defaults, and those that have none there."""
    fields = {field.name: default_of(field) for field in dataclasses.fields(instance)}
    values = {name: getattr(instance, name) for name in fields}
    return {name: to_plain(value) for name, value in values.items() if value != fields[name]}


def _flow(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {_yaml(value)}" for name, value in values.items()) + "}"


def _yaml(value: Any) -> str:
    return code(value).strip("`")


def _values(cls: type, field: dataclasses.Field[Any], hint: Any, link: Link) -> str:
    """What the field takes, in words."""
    if "reference" in field.metadata:
        return _reference(field, hint)
    if cls is RunConfig and field.name == "stages":
        return "map of names to [stages](#kinds-of-stage)"
    group, kinds, listed = group_of(hint), kinds_of(hint), listed_dataclass(hint)
    if group is not None:
        return link(group) if group is hint else f"{link(group)} or null"
    if kinds:
        return ", ".join(link(inner) for inner in kinds.values())
    words = f"list of {link(listed)}" if listed is not None else type_words(hint)
    rule = rule_of(cls, field.name)
    return words if rule is None else f"{words}, {rule.allowed.removeprefix('a number ')}"


def _reference(field: dataclasses.Field[Any], hint: Any) -> str:
    artifacts = " or ".join(_ARTIFACTS.get(name, name) for name in field.metadata["reference"])
    base = "`base`, " if "policy" in field.metadata["reference"] else ""
    outside = ", `hub:ORG/NAME`" if field.metadata.get("external") else ""
    several = "list of references" if list in (hint, getattr(hint, "__origin__", None)) else "reference"
    null = " or null" if type(None) in get_args(hint) else ""
    return f"{several} to {artifacts}: {base}`stage:NAME`, `path:FOLDER`{outside}{null}"


def _choices(cls: type) -> Iterator[tuple[str, str]]:
    """The fields that take one of several words, with what the words mean."""
    for name, hint in field_types(cls).items():
        for option in (hint, *get_args(hint)):
            if isinstance(option, type) and issubclass(option, Enum) and option.__doc__:
                yield name, prose(option.__doc__)
