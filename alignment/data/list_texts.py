"""Lists that a file holds as JSON text, as CSV must and as some Parquet files do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignment.data.row_files import JsonLine, RawRow, parsed

TURNS = ("messages", "conversations", "chosen_messages", "rejected_messages")
"""Columns that are named after turns. In others, such as ``prompt`` or ``chosen``, JSON may be the text itself."""
_LISTS = (*TURNS, "completions", "choices", "turns", "history")
_TURNS, _TEXTS = re.compile(r"\s*\[\s*\{"), re.compile(r"\s*\[\s*['\"]")


def with_lists(row: Any) -> Any:
    """The row with lists in place of their JSON; text that is no JSON of a list stays, for a format to refuse."""
    if not isinstance(row, Mapping):
        return row
    lists = {name: listed for name in _LISTS if (listed := _listed(row.get(name))) is not None}
    if "turns" in lists:  # then the references to them are text too, which elsewhere is one reference
        references = _listed(row.get("reference"))
        are_texts = all(value is None or isinstance(value, str) for value in references or ())
        if references is not None and are_texts and len(references) == len(lists["turns"]):
            lists["reference"] = references
    return {**row, **lists} if lists else row


def begins_turns(value: Any) -> bool:
    """Whether ``value`` is text that begins like a list of objects."""
    return isinstance(value, str) and _TURNS.match(value) is not None


def begins_texts(value: Any) -> bool:
    """Whether ``value`` is text that begins like a list of quoted texts, unlike ``[A] 3 [B] 4``."""
    return isinstance(value, str) and _TEXTS.match(value) is not None


def _listed(value: Any) -> list[Any] | None:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    row = parsed(JsonLine(where="", text=value.encode()))  # with the limits of a line of JSON
    return row.value if isinstance(row, RawRow) and isinstance(row.value, list) else None
