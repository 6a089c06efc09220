"""Ollama's ``Modelfile`` beside a GGUF file: the model's own template and stops.

Without a TEMPLATE, Ollama looks for the nearest of some twenty templates that it knows, and takes none if the chat
template in the file is like none of them (ollama, server/model.go and template/template.go). So the template is
derived from the model's own, and is refused if it would write other prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from alignment.core.errors import DataError, ModelError
from alignment.data.templates import each
from alignment.data.tokens.rendering import render
from alignment.data.turns import Message

ROLES = ("system", "user", "assistant")


class Inexpressible(Exception):
    """A chat template does more than writing fixed texts around contents; the message says where that shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatParts:
    """``turns`` are the texts in front of a role's content and behind it.

    Example (SmolLM2): ``begin ""``, ``default_system "<|im_start|>system\\nYou are …<|im_end|>\\n"``, ``turns
    {"user": ("<|im_start|>user\\n", "<|im_end|>\\n"), …}``, ``answer "<|im_start|>assistant\\n"``."""

    begin: str
    default_system: str
    """Written after ``begin`` if the first turn is not a system turn."""
    turns: dict[str, tuple[str, str]]
    answer: str
    """Written at the end, where the model is to answer."""

    def rendered(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, as a template of these parts writes it."""
        default = "" if messages[0].role == "system" else self.default_system
        turns = [message.content.join(self.turns[message.role]) for message in messages]
        return "".join([self.begin, default, *turns, self.answer])


def conversation(*roles: str) -> list[Message]:
    """Turns of these roles, whose contents are different words that no template contains."""
    return [Message(role=role, content=f"Probe{index}{role}Content") for index, role in enumerate(roles)]


def chat_parts(tokenizer: Any, *, bos: str) -> ChatParts:
    """The parts of the tokenizer's chat template, without ``bos`` in front of a conversation. They write what it writes
    only if the texts around a content depend on nothing but its role, which the caller checks."""
    _, user_after = _around(tokenizer, "user")
    start, user_to_answer, answer_to_user, _, answer_after = _around(tokenizer, *("user", "assistant") * 2)
    before_user = answer_to_user.removeprefix(answer_after)
    turns = {"user": (before_user, user_after), "assistant": (user_to_answer.removeprefix(user_after), answer_after)}
    start, begin = start.removesuffix(before_user), ""
    with suppress(DataError):  # the template refuses a system turn
        before, to_user, _ = _around(tokenizer, "system", "user")
        with suppress(DataError, Inexpressible):  # a later system turn shows where its opening begins
            opening = _around(tokenizer, "user", "assistant", "system", "user")[2].removeprefix(answer_after)
            if before.endswith(opening):
                begin, before = before.removesuffix(opening), opening
        turns["system"] = (before.removeprefix("" if begin else bos), to_user.removesuffix(before_user))
    default_system = start.removeprefix(begin) if "system" in turns else ""
    return ChatParts(
        begin=(begin if "system" in turns else start).removeprefix(bos),
        default_system=default_system.removeprefix("" if begin else bos),
        turns=turns,
        answer=_around(tokenizer, "user", answering=True)[1].removeprefix(user_after),
    )


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


def template_of(parts: ChatParts) -> str:
    """A template in Ollama's language that writes the parts around the contents."""
    default = parts.default_system and _inside('if ne .Role "system"', _literal(parts.default_system))
    start = _literal(parts.begin) + default
    first = _inside("if eq $index 0", start) if start else ""
    branches = [
        f'if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
        for role in ROLES
        if role in parts.turns
        for before, after in [parts.turns[role]]
    ]
    turn = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    return _inside("range $index, $message := .Messages", first + turn) + _literal(parts.answer)


def _inside(opening: str, body: str) -> str:
    return f"{{{{ {opening} }}}}{body}{{{{ end }}}}"


def _literal(text: str) -> str:
    """The text as it is; as a quoted string if the template or the Modelfile would read it otherwise."""
    # A Modelfile loses characters that Go does not call printable, and ends a text at three quotation marks.
    if not text or (all(letter.isprintable() or letter == "\n" for letter in text) and not re.search('[{}"]', text)):
        return text
    escaped = (
        letter
        if letter.isprintable() and letter not in '{}"\\'
        else f"\\u{ord(letter):04x}"
        if ord(letter) < 1 << 16
        else f"\\U{ord(letter):08x}"
        for letter in text
    )
    return f'{{{{ "{"".join(escaped)}" }}}}'


LARGEST_CONTEXT = 8192
"""Tokens that Ollama is asked to hold at most, because it reserves memory for all of them; chosen, not tuned."""

CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant", "user"),
)
"""The roles of conversations that a template must render as the model's own does."""
CONTENTS = (
    "Two lines.\nThe second one, with 'quotes', \"more\" and a \\ in it.",
    "{{ .Content }} {% if x %} {} %s",
    "Grüße an 東京 🙂",
    "#",
)


def modelfile(
    gguf_name: str, tokenizer: Any, *, stops: Sequence[str], context: int, adds_bos: bool
) -> tuple[str, list[str]]:
    """The file's text, and notes about what it cannot say. ``stops`` are the texts of the tokens that end an answer,
    ``context`` is the model's longest text in tokens, and ``adds_bos`` says that llama.cpp puts BOS in front of a
    prompt. Raises ModelError: the chat template cannot be written in Ollama's language."""
    template, notes = "{{ .Prompt }}", ["the model has no chat template, so Ollama sends it plain prompts"]
    if tokenizer.chat_template:
        try:
            template, notes = ollama_template(tokenizer, bos=tokenizer.bos_token if adds_bos else "")
        except Inexpressible as error:
            remedy = "add --no-modelfile; llama-server takes the chat template from the GGUF file as it is"
            raise ModelError(f"the chat template cannot be written for Ollama: {error}", remedy=remedy) from error
    lines = [
        "# ollama create NAME -f Modelfile",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        f"PARAMETER num_ctx {min(context, LARGEST_CONTEXT)}",
        "PARAMETER repeat_penalty 1",  # older versions of Ollama penalise what a prompt contains
    ]
    return "\n".join(lines) + "\n", notes


def ollama_template(tokenizer: Any, *, bos: str) -> tuple[str, list[str]]:
    """The chat template in Ollama's language, and notes about what it leaves out, as it does ``bos``, which llama.cpp
    puts in front of a prompt. Raises Inexpressible: it would write other prompts than the chat template."""
    parts = chat_parts(tokenizer, bos=bos)
    has_system = "system" in parts.turns
    for turns in _conversations(has_system=has_system):
        wanted = render(tokenizer, turns, answering=True)
        if bos + parts.rendered(turns) != wanted:
            raise Inexpressible(f"a conversation of {', '.join(turn.role for turn in turns)} is {wanted!r}")
    notes = [] if has_system else ["the chat template has no system turn, so Ollama ignores system messages"]
    if _trims(tokenizer):
        notes.append("the chat template strips whitespace around contents; Ollama does not")
    if any("tools" in text for text in each(tokenizer.chat_template)):
        notes.append("tools work with llama-server, not with the Modelfile")
    return template_of(parts), notes


def _conversations(*, has_system: bool) -> Iterator[list[Message]]:
    for roles in CONVERSATIONS:
        if has_system or "system" not in roles:
            yield conversation(*roles)
            yield [
                Message(role=role, content=CONTENTS[(index + len(roles)) % len(CONTENTS)])
                for index, role in enumerate(roles)
            ]


def _trims(tokenizer: Any) -> bool:
    blanks = [Message(role="user", content="  two words \n")]
    try:
        return blanks[0].content not in render(tokenizer, blanks, answering=True)
    except DataError:
        return False
