"""An assistant's thoughts in the form that a chat template reads. A row has a thought in a field of its own, or between
``<think>`` and ``</think>`` in the content. Templates read a field (``reasoning_content`` of Qwen and Nemotron,
``thinking`` of gpt-oss), or look for the tags in the content, or render the content as it is. A thought is moved to
where the template reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.data.templates import Templates, fields_of
from alignment.data.turns import CLOSE, OPEN, THOUGHTS, Message, tagged


def with_readable_thought(templates: Templates, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn in the form of ``Message.as_dict``, with its thought where ``templates`` read it. Example: ``{"content":
    "4.", "reasoning_content": "2 + 2"}`` becomes ``{"content": "4.", "thinking": "2 + 2"}`` for gpt-oss, and
    ``{"content": "<think>\\n2 + 2\\n</think>\\n\\n4."}`` for a template that reads no such field. Raises DataError: a
    template is not valid Jinja."""
    if turn["role"] != "assistant":
        return dict(turn)
    read = fields_of(templates)
    fields = [name for name in THOUGHTS if name in read]
    thought, content = turn.get(THOUGHTS[0], ""), turn["content"]
    others = {name: value for name, value in turn.items() if name != THOUGHTS[0]}
    if not fields:
        content = opened(content) if CLOSE in read else content
        return others | {"content": tagged(thought, content) if thought else content}
    content = opened(content)
    inside, answer = split(content)
    if not thought and (inside or CLOSE not in read):
        thought, content = inside, answer
    return others | {"content": content} | (dict.fromkeys(fields, thought) if thought else {})


def without_thought(message: Message) -> Message:
    """The message as templates render it that drop thoughts."""
    if message.role != "assistant":
        return message
    return replace(message, thought="", content=split(opened(message.content))[1])


def split(content: str) -> tuple[str, str]:
    """The thought in front of an answer, and the answer; no thought if the content does not begin with one."""
    thought, close, answer = content.partition(CLOSE)
    if not close or not thought.lstrip().startswith(OPEN):
        return "", content
    return thought.lstrip().removeprefix(OPEN).strip("\n"), answer.lstrip("\n")


def opened(content: str) -> str:
    """The content with the tag that opens its thought. A model does not write it behind a prompt that ends with it."""
    return f"{OPEN}\n{content}" if CLOSE in content and OPEN not in content else content


def opened_once(prompt: str, answer: str) -> str:
    """The rendered answer without the tag that opens its thought if the ``prompt`` ends with that tag already."""
    if prompt.rstrip().endswith(OPEN) and answer.lstrip().startswith(OPEN):
        return answer.lstrip().removeprefix(OPEN).lstrip("\n")
    return answer


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
    return part in text or all(
        line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text for line in map(str.strip, part.splitlines())
    )


def lost_words(loss: str, count: int, records: int) -> str:
    """A sentence about one of ``LOSSES`` and the number of records that have it."""
    return f"the chat template leaves out {loss} in {count:,} of {records:,} records"
