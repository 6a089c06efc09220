"""Fields that Arrow adds: in its columns, and so in Parquet, every object has the fields of all others.

A tool would have every other tool's parameters, and a call their arguments, each of them null, and a model would read
them. A null that the author wrote looks the same and is dropped too: neither a schema nor a call needs one. Data sets
of a hub are read into Arrow, whatever their files are, and only some of their columns keep objects as they were. In
JSON Lines, and in tools that are JSON text, every null is the author's and stays.
"""

from __future__ import annotations

from typing import Any


def without_filled(value: Any) -> Any:
    """``value`` without the null fields of the functions in it: objects with a name, and parameters or arguments.

    Other columns, which a scorer may read, stay as they are.
    """
    if isinstance(value, list):
        return [without_filled(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "name" in value and ("parameters" in value or "arguments" in value):
        return _without_nulls(value)
    return {name: without_filled(item) for name, item in value.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value
