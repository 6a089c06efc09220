"""Conversations rendered without the template, where it only writes the contents of turns (template_flow.py).

Then all conversations with the same roles have the same text around their contents. The template renders it once, with
marks for contents, and every further conversation is put together from it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.template_flow import ROLES, only_writes_contents
from alignment.data.turns import CLOSE, Message

Render = Callable[[Sequence[Message]], str]
"""Renders messages with the template."""

MOST = 1_000
"""Skeletons of a template that are kept; every number of turns needs some."""
_BLANK = "\u2003"
"""Stands on both sides of a mark, and is missing where the template strips a content."""
_MARK = '\U000ffffd%d"\\\n<Aa\U000ffffd'
"""A mark for content %d. A filter that was overlooked would change one of its characters."""
_MARKS = re.compile(f"({_BLANK}?){re.escape(_MARK).replace('%d', '([0-9]+)')}({_BLANK}?)")
_STRIPPED: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (False, False): str.strip,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
}
"""How a content is written, by whether the blanks in front of it and behind it are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Skeleton:
    """``start``, then for each slot the content of a message, stripped in some way, and the text behind it."""

    start: str
    slots: tuple[tuple[int, Callable[[str], str], str], ...]

    def filled(self, contents: Sequence[str]) -> str:
        """The text of a conversation."""
        parts = [self.start]
        for number, stripped, behind in self.slots:
            parts.append(stripped(contents[number]))
            parts.append(behind)
        return "".join(parts)


class Skeletons:
    """Skeletons of one template by roles, and by whether an answer is asked for."""

    def __init__(self) -> None:
        self._by_roles: dict[tuple[bool, tuple[str, ...]], _Skeleton | None] = {}

    def rendered(
        self, messages: Sequence[Message], escaped: Callable[[str], str], render: Render, *, answering: bool
    ) -> str | None:
        """The messages as ``render`` renders them; None if only ``render`` can.

        ``escaped`` is applied to contents first.
        """
        if not all(map(_is_plain, messages)):
            return None
        key = answering, tuple([message.role for message in messages])
        contents = [escaped(message.content) for message in messages]
        if key in self._by_roles:
            skeleton = self._by_roles[key]
            return None if skeleton is None else skeleton.filled(contents)
        if len(self._by_roles) >= MOST:
            return None
        text = render(messages)
        skeleton = _skeleton(key[1], render)
        self._by_roles[key] = skeleton if skeleton is not None and skeleton.filled(contents) == text else None
        return text


@functools.lru_cache(maxsize=16)
def skeletons_of(tokenizer: Any, template: str) -> Skeletons | None:
    """The skeletons of a template with the special tokens of the tokenizer; None if it does more than write."""
    del tokenizer  # its special tokens are part of what is rendered
    return Skeletons() if only_writes_contents(template) else None


def _is_plain(message: Message) -> bool:
    """Whether a template is given its role and its content as it is, and nothing else."""
    content = message.content
    others = message.tool_calls or message.thought or message.call_id or message.name
    return message.role in ROLES and not others and CLOSE not in content and content != "" and not content.isspace()


def _skeleton(roles: Sequence[str], render: Render) -> _Skeleton | None:
    marked = [Message(role=role, content=f"{_BLANK}{_MARK % number}{_BLANK}") for number, role in enumerate(roles)]
    text = render(marked)
    start, *rest = _MARKS.split(text)
    slots = tuple(
        (int(number), _STRIPPED[(before != "", after != "")], behind)
        for before, number, after, behind in zip(*(rest[first::4] for first in range(4)), strict=True)
    )
    literals = [start, *(behind for _, _, behind in slots)]
    is_clean = not any(character in literal for literal in literals for character in (_BLANK, _MARK[0]))
    return _Skeleton(start=start, slots=slots) if is_clean else None
