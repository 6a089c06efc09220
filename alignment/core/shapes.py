"""Checks that plain data from a file has the types that annotations declare."""

from __future__ import annotations

from typing import Any, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` and everything in it has the type ``hint``, such as ``dict[str, int]``. A float may be None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, hint)
