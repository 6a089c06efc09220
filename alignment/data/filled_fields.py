"""Fields that Arrow adds: in its columns, and so in Parquet, every object has the fields of all others.

A tool would have every other tool's parameters, and a call their arguments, each of them null, and a model would read
them. A null that the author wrote looks the same and is dropped too: neither a schema nor a call needs one. Data sets
of a hub are read into Arrow, whatever their files are, and only some of their columns keep objects as they were. In
JSON Lines, and in tools that are JSON text, every null is the author's and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_FUNCTIONS = frozenset({"parameters", "input_schema", "arguments"})
"""A function has a name and one of these: OpenAI's and Anthropic's schema of a tool, or a call's arguments."""


def without_filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the null fields of the functions in its columns.

    Other columns, which a scorer may read, stay as they are. So does the row itself, whatever its columns are called.
    """
    return {column: _without_filled(value) for column, value in row.items()}


def _without_filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_filled(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "name" in value and not _OF_FUNCTIONS.isdisjoint(value):
        return _without_nulls(value)
    return {name: _without_filled(item) for name, item in value.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value
