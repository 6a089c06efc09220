"""What a chat template writes around the contents of turns, found by rendering conversations.

A Jinja template can compute anything. Most chat templates only put a fixed text in front of each turn's content and
behind it. These texts are found here; whether they are all that the template does is checked by ``modelfile.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alignment.core.errors import DataError
from alignment.data.tokens.rendering import render
from alignment.data.turns import Message

ROLES = ("system", "user", "assistant")


class Inexpressible(Exception):
    """A chat template does more than writing fixed texts around contents; the message says where that shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatParts:
    """``turns`` are the texts in front of a role's content and behind it.

    Example (SmolLM2): ``begin ""``, ``default_system "<|im_start|>system\\nYou are …<|im_end|>\\n"``, ``turns
    {"user": ("<|im_start|>user\\n", "<|im_end|>\\n"), …}``, ``answer "<|im_start|>assistant\\n"``.
    """

    begin: str
    default_system: str
    """Written after ``begin`` if the first turn is not a system turn."""
    turns: dict[str, tuple[str, str]]
    answer: str
    """Written at the end, where the model is to answer."""

    def without_start(self, start: str) -> ChatParts:
        """The parts of a template that does not write ``start`` in front of a conversation.

        Raises:
            Inexpressible: this one does not begin every conversation with it.
        """
        if self.begin.startswith(start):
            return replace(self, begin=self.begin[len(start) :])
        where = "at the beginning"
        before, after = self.turns.get("system", ("", ""))
        turns = {**self.turns, "system": (_behind(before, start, where), after)}
        return replace(self, default_system=_behind(self.default_system, start, where), turns=turns)


def conversation(*roles: str) -> list[Message]:
    """Turns of these roles, whose contents are different words that no template contains."""
    return [Message(role=role, content=f"Probe{index}{role}Content") for index, role in enumerate(roles)]


def chat_parts(tokenizer: Any) -> ChatParts:
    """The parts of the tokenizer's chat template.

    Raises:
        Inexpressible: the texts around a content depend on more than its role.
    """
    _, user_after = _around(tokenizer, "user")
    start, user_to_answer, answer_to_user, _, answer_after = _around(tokenizer, *("user", "assistant") * 2)
    before_answer = _behind(user_to_answer, user_after, "between a user's turn and an answer")
    before_user = _behind(answer_to_user, answer_after, "between an answer and a user's turn")
    start = _ahead(start, before_user, "in front of the first user's turn")
    turns = {"user": (before_user, user_after), "assistant": (before_answer, answer_after)}
    _, to_answer = _around(tokenizer, "user", answering=True)
    answer = _behind(to_answer, user_after, "after the last user's turn")
    system = _system(tokenizer, before_user, answer_after)
    if system is None:
        return ChatParts(begin=start, default_system="", turns=turns, answer=answer)
    begin, before, after = system
    return ChatParts(
        begin=begin,
        default_system=_behind(start, begin, "at the beginning"),
        turns={"system": (before, after), **turns},
        answer=answer,
    )


def _system(tokenizer: Any, before_user: str, answer_after: str) -> tuple[str, str, str] | None:
    """What begins a conversation, and the texts around a system turn's content; None if the template refuses one."""
    try:
        start, to_user, _ = _around(tokenizer, "system", "user")
    except DataError:
        return None
    after = _ahead(to_user, before_user, "between a system turn and a user's turn")
    try:  # a later system turn shows where its opening begins
        _, _, opening, _, _ = _around(tokenizer, "user", "assistant", "system", "user")
        before = _behind(opening, answer_after, "in front of a later system turn")
        return _ahead(start, before, "in front of the first system turn"), before, after
    except (DataError, Inexpressible):
        return "", start, after


def _around(tokenizer: Any, *roles: str, answering: bool = False) -> list[str]:
    """The texts in front of, between and behind the contents of a conversation of these roles."""
    turns = conversation(*roles)
    rest = render(tokenizer, turns, answering=answering)
    texts = []
    for turn in turns:
        text, content, rest = rest.partition(turn.content)
        if not content:
            raise Inexpressible(f"the content of a turn of the role {turn.role} is left out")
        texts.append(text)
    texts.append(rest)
    if any(turn.content in text for turn in turns for text in texts):
        raise Inexpressible("the content of a turn is repeated or moved")
    return texts


def _behind(text: str, start: str, where: str) -> str:
    if not text.startswith(start):
        raise Inexpressible(f"{where} it writes {text!r}, which does not begin with {start!r}")
    return text[len(start) :]


def _ahead(text: str, end: str, where: str) -> str:
    if not text.endswith(end):
        raise Inexpressible(f"{where} it writes {text!r}, which does not end with {end!r}")
    return text[: len(text) - len(end)]
