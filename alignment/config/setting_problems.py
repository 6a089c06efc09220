"""Types of settings that no value of a recipe can have: ``config/typed.py`` converts plain values to the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from alignment.config.typed import field_types

_INSTEAD: dict[Any, str] = {
    Literal: "an Enum",
    Path: "str",
    dict: "dict[str, TYPE]",
    **dict.fromkeys((list, tuple, set, frozenset), "list[TYPE]"),
}
_ANY_OF_THEM = "bool, int, float, str or an Enum, list[TYPE] or dict[str, TYPE] of these, a dataclass, or a list of one"


def of_settings(settings: type, *, where: str = "", inside: tuple[type, ...] = ()) -> Iterator[str]:
    """What is wrong with the types in a dataclass, and in those ``inside`` it, each as the end of a sentence.

    Raises:
        Exception: whatever another package's annotations raise when they are read.
    """
    for name, hint in field_types(settings).items():
        for part in _not_for_recipes(hint):
            remedy = _INSTEAD.get(get_origin(part) or part, _ANY_OF_THEM)
            shown = _shown(hint if _is_group(part) else part)
            yield f"has a setting {where}{name} of the type {shown}, which a recipe cannot hold; use {remedy}"
        for group in _groups(hint):
            if group is not hint and (why := _why_not_made(group)):
                every = f"give every setting of {group.__name__} a default"
                yield f"has a setting {where}{name} of groups without defaults: {why}; {every}"
            if group not in inside:
                yield from of_settings(group, where=f"{where}{name}.", inside=(*inside, group))


def _options(hint: Any) -> list[Any]:
    """The types of a union, or the only type, without None."""
    options = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    return [option for option in options if option is not NoneType]


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _groups(hint: Any) -> list[type]:
    """The dataclasses of a setting that is a group, one of several groups, or a list of groups."""
    items = get_args(hint) if get_origin(hint) is list else _options(hint)
    return [item for item in items if _is_group(item)]


def _not_for_recipes(hint: Any) -> list[Any]:
    """The parts of a setting's type that no value can have."""
    options = _options(hint)
    groups = _groups(hint)
    if not groups:
        return [part for option in options for part in _not_plain(option)]
    if get_origin(hint) is list or hint is groups[0] or (len(options) == 1 and NoneType in get_args(hint)):
        return []
    by_kind = len(groups) == len(get_args(hint)) and all("kind" in field_types(group) for group in groups)
    return [] if by_kind else [hint]


def _not_plain(hint: Any) -> list[Any]:
    """The parts of a type without dataclasses that no value can have."""
    base, arguments = get_origin(hint), get_args(hint)
    if base is list and arguments:
        return _of_union(arguments[0])
    if base is dict and arguments[:1] == (str,):
        return _of_union(arguments[1])
    is_plain = hint in (bool, int, float, str, Any) or (isinstance(hint, type) and issubclass(hint, Enum))
    return [] if base is None and is_plain else [hint]


def _of_union(hint: Any) -> list[Any]:
    return [part for option in _options(hint) for part in _not_plain(option)]


def _why_not_made(group: type) -> str:
    try:
        group()
    except Exception as error:  # noqa: BLE001 - another package's code
        return f"{type(error).__name__}: {error}"
    return ""


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
