"""Whole conversations: OpenAI's messages and ShareGPT's, labelled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignment.data.fields import Fields
from alignment.data.formats.form import Format, answer_text, asked, holds, starts_with_turn
from alignment.data.records import Example
from alignment.data.turns import Message, tools_of


def _conversation(column: str) -> Callable[[Fields], Example]:
    """A reader for rows with all turns in one column."""

    def read(fields: Fields) -> Example:
        turns, field = asked(fields, column)
        return Example(fields=fields, turns=turns, tools=tools_of(fields), field=field)

    return read


def _has_turns(row: Mapping[str, Any], field: str, key: str) -> bool:
    return starts_with_turn(row.get(field)) and key in row[field][0]


def _labelled(fields: Fields) -> Example:
    turns, field = asked(fields)
    if fields.has("completion"):
        turns = (*turns, Message(role="assistant", content=answer_text(fields, "completion")))
    return Example(fields=fields, turns=turns, good=fields.flag("label"), tools=tools_of(fields), field=field)


MESSAGES = Format(
    name="messages",
    summary="OpenAI's messages, with tools and tool calls",
    row='{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}',
    fits=lambda row: _has_turns(row, "messages", "role"),
    read=_conversation("messages"),
)

SHAREGPT = Format(
    name="sharegpt",
    summary="ShareGPT's conversations, with from and value, system and tools",
    row='{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}',
    fits=lambda row: _has_turns(row, "conversations", "from") or _has_turns(row, "conversations", "role"),
    read=_conversation("conversations"),
)

KTO = Format(
    name="kto",
    summary="one answer with a label: good or bad",
    row='{"prompt": "2 + 2?", "completion": "4.", "label": true}',
    fits=lambda row: (
        holds(row, "label") and (starts_with_turn(row.get("messages")) or holds(row, "prompt", "completion"))
    ),
    read=_labelled,
)
