"""What a chat template leaves out of a conversation, such as the thoughts of earlier turns.

A text counts as rendered if each of its lines is somewhere in the result, as it is or as JSON. Templates may trim it,
indent it or put it elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignment.data.tokens.thoughts import opened, split
from alignment.data.turns import Message

EARLIER_THOUGHTS = "thoughts of earlier turns"
LEARNED_THOUGHTS = "thoughts of answers that are learned"
_CONTENTS = {
    "system": "system turns",
    "user": "user turns",
    "assistant": "contents of assistant turns",
    "tool": "results of tools",
}
CALLS = "calls of tools"
LOSSES = (EARLIER_THOUGHTS, LEARNED_THOUGHTS, *_CONTENTS.values(), CALLS)
"""Everything that ``losses`` may name."""


def losses(context: Sequence[Message], answers: Sequence[Message], text: str) -> frozenset[str]:
    """Those of ``LOSSES`` that ``text`` lacks. It has the turns of ``context``, and ``answers``, which are learned."""
    return frozenset(
        name
        for turns, thoughts in ((context, EARLIER_THOUGHTS), (answers, LEARNED_THOUGHTS))
        for turn in turns
        for name in _losses_of(turn, thoughts, text)
    )


def _losses_of(turn: Message, thoughts: str, text: str) -> Iterator[str]:
    thought, content = turn.thought, turn.content
    if turn.role == "assistant" and not thought:
        thought, content = split(opened(content))
    if not _is_in(thought, text):
        yield thoughts
    if not _is_in(content, text):
        yield _CONTENTS[turn.role]
    if not all(_is_in(value, text) for call in turn.tool_calls for value in _leaves(call["function"]["arguments"])):
        yield CALLS


def _leaves(value: Any) -> Iterator[str]:
    """The texts and whole numbers in JSON data; templates write other values in several ways."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        yield str(value)


def _is_in(part: str, text: str) -> bool:
    return part in text or all(_line_is_in(line.strip(), text) for line in part.splitlines())


def _line_is_in(line: str, text: str) -> bool:
    return line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text


def lost_words(loss: str, count: int, records: int) -> str:
    """A sentence about one of ``LOSSES`` and the number of records that have it."""
    return f"the chat template leaves out {loss} in {count:,} of {records:,} records"
