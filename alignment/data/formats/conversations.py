"""Whole conversations: OpenAI's messages and ShareGPT's, labelled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignment.data.fields import Fields
from alignment.data.formats.form import Format, answer_text, asked, holds, starts_with_turn
from alignment.data.formats.plain import ALPACA, QUESTION_ANSWER
from alignment.data.records import Example
from alignment.data.turns import Message, tools_of

_WORDS = ("true", "false")
_LABELLED: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "messages": lambda row: starts_with_turn(row.get("messages")),
    "prompt": lambda row: holds(row, "prompt", "completion"),
    "conversations": lambda row: starts_with_turn(row.get("conversations")) and _is_one_of(row, *_WORDS, "1", "0"),
    "instruction": lambda row: ALPACA.fits(row) and _is_one_of(row, *_WORDS),
    "question": lambda row: QUESTION_ANSWER.fits(row) and _is_one_of(row, *_WORDS),
}
"""What a row with a label has besides, by the column that holds its prompt. Next to conversations, an instruction or a
question the label may be a class, such as a topic, so it must be true or false. Next to the latter two it may also be
the number of a class, so 1 and 0 do not count there."""
_ANSWERS = {"instruction": "output", "question": "answer"}
"""The column of the labelled answer, if it is not ``completion``."""


def _conversation(column: str) -> Callable[[Fields], Example]:
    """A reader for rows with all turns in one column."""

    def read(fields: Fields) -> Example:
        turns, field = asked(fields, column)
        return Example(fields=fields, turns=turns, tools=tools_of(fields), field=field)

    return read


def _has_turns(row: Mapping[str, Any], field: str, key: str) -> bool:
    return starts_with_turn(row.get(field)) and key in row[field][0]


def _is_one_of(row: Mapping[str, Any], *labels: str) -> bool:
    return str(row["label"]).strip().lower() in labels


def _labelled_prompt(row: Mapping[str, Any]) -> str | None:
    """The column with the prompt of a labelled answer, or None if the row has no label or nothing that it applies
    to."""
    if not holds(row, "label"):
        return None
    return next((column for column, fits in _LABELLED.items() if fits(row)), None)


def _labelled(fields: Fields) -> Example:
    turns, field = asked(fields, _labelled_prompt(fields.row))
    own = _ANSWERS.get(field, "completion")
    answer = own if fields.has(own) else "completion"
    if fields.has(answer):
        turns = (*turns, Message(role="assistant", content=answer_text(fields, answer)))
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
    fits=lambda row: _labelled_prompt(row) is not None,
    read=_labelled,
)
