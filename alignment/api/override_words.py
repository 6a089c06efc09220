"""Overrides from Python values: ``{"stages.dpo.beta": 0.3}`` becomes ``stages.dpo.beta=0.3``."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from alignment.core.errors import ConfigError

Value = None | bool | int | float | str | os.PathLike[str] | Sequence["Value"] | Mapping[str, "Value"]
Overrides = Sequence[str] | Mapping[str, Value]

_PLAIN = re.compile(r"[A-Za-z_][\w./:@-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NOT_TEXT = ("true", "false", "null", "nan", "inf")
_BEFORE_A_QUOTE = re.compile(r"(\\*)('|$)")


def words(overrides: Overrides) -> list[str]:
    """Overrides as they are typed on the command line.

    Raises:
        TypeError: they are neither texts nor a mapping.
        ConfigError: they are one text instead of several, or a value cannot be written in a configuration.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"{overrides!r} is a single string", where="overrides", remedy=f"give a list [{overrides!r}], or a mapping"
        )
    if isinstance(overrides, Mapping):
        return [f"{key}={_written(value, key)}" for key, value in overrides.items()]
    given = list(overrides) if isinstance(overrides, Iterable) else [overrides]
    if wrong := [item for item in given if not isinstance(item, str)]:
        raise TypeError(
            f"{wrong[0]!r} is not an override; give texts, as in ['stages.dpo.beta=0.3'], or a mapping, as in "
            "{'stages.dpo.beta': 0.3}"
        )
    return given


def _written(value: object, key: str) -> str:
    """A value in Hydra's grammar, such that it is read as the same value."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case numbers.Integral():
            return str(int(value))
        case numbers.Real():
            return repr(float(value))
        case str() | os.PathLike():
            return _text(os.fspath(value))
        case Mapping():
            return "{" + ", ".join(f"{_name(name, key)}: {_written(item, key)}" for name, item in value.items()) + "}"
        case Sequence() if not isinstance(value, bytes):
            return "[" + ", ".join(_written(item, key) for item in value) + "]"
    raise ConfigError(
        f"{type(value).__name__} cannot be written in a configuration",
        where=key,
        remedy="give None, a bool, a number, a string, a path, or a list or mapping of these",
    )


def _name(name: object, key: str) -> str:
    """The name of a setting in a group, which Hydra does not take in quotes."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ConfigError(f"{name!r} cannot name a setting", where=key, remedy="use letters, digits and _")


def _text(text: str) -> str:
    """Text that needs no quotes, or text in quotes. Hydra halves only the backslashes before a quote."""
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    escaped = _BEFORE_A_QUOTE.sub(lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
