"""Whether plain data from a file has the form that annotations say."""

from __future__ import annotations

from typing import Any, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether it is that, all through: ``dict[str, int]`` holds texts and whole numbers. A float may be absent."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is dict:
        key, item = parts
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, hint)
