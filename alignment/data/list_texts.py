"""Lists that a file holds as JSON text, as CSV must and as some Parquet files do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.data.row_files import JsonLine, RawRow, parsed

TURNS = ("messages", "conversations", "chosen_messages", "rejected_messages")
"""Columns that are named after turns. In others, such as ``prompt`` or ``chosen``, JSON may be the text itself."""
_LISTS = (*TURNS, "completions", "choices", "turns", "history")


def with_lists(row: Any) -> Any:
    """The row with lists in place of their JSON; text that is no JSON of a list stays, for a format to refuse."""
    if not isinstance(row, Mapping):
        return row
    lists = {name: listed for name in _LISTS if (listed := _listed(row.get(name))) is not None}
    return {**row, **lists} if lists else row


def begins_list(value: Any) -> bool:
    """Whether ``value`` is text that begins like a list."""
    return isinstance(value, str) and value.lstrip().startswith("[")


def begins_turns(value: Any) -> bool:
    """Whether ``value`` is text that begins like a list of objects."""
    return begins_list(value) and value.lstrip()[1:].lstrip().startswith("{")


def _listed(value: Any) -> list[Any] | None:
    if not begins_list(value):
        return None
    row = parsed(JsonLine(where="", text=value.encode()))  # with the limits of a line of JSON
    return row.value if isinstance(row, RawRow) and isinstance(row.value, list) else None
