"""Messages → text by the tokenizer's own chat template, cut where the assistant's turns begin and end.

A turn is found by rendering prefixes: it is what its prefix adds to the prefix with a generation prompt, up to and
including the control token that ends the turn. Nothing is ever inferred from token ids, because pad may equal EOS.

Control tokens that somebody wrote into a message stay text: while the template is at work a private-use character
stands for each of them, so that only the template's own are left in what it renders (``encode`` puts them back).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.core.deadline import SECONDS, Bounded
from alignment.core.errors import AlignmentError, DataError, ModelError
from alignment.data.turns import Message

Tools = Sequence[Mapping[str, Any]]
"""What the assistant may call, as chat templates take it."""

LAST_STAND_IN = 0x10FFFD
"""The end of Unicode's last private-use area; icon fonts use the other ones."""


_KEEPS_TURNS = (
    "set model.chat_template=chatml, which renders every turn as it stands in the row (but knows no tools), or "
    "path:FILE of a template that does"
)


_ENDLESS = ModelError(
    f"the chat template computes for more than {SECONDS:g} s for one rendering",
    remedy="look for loops in the template, or set model.chat_template=chatml, or path:FILE of another",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rendered text that is tokenised by itself, and whether its tokens are learned."""

    text: str
    learned: bool


class ControlTokens:
    """The special tokens of a tokenizer, and the characters that stand for them where they are meant as text."""

    def __init__(self, tokenizer: Any) -> None:
        found = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(found, key=len, reverse=True)
        self.ids = found
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._stand_ins = {token: chr(LAST_STAND_IN - place) for place, token in enumerate(longest_first)}
        self._tokens = {ord(stand_in): token for token, stand_in in self._stand_ins.items()}
        self.unused = chr(LAST_STAND_IN - len(found))
        """Stands for nothing."""
        self._used = re.compile("[" + "".join(self._stand_ins.values()) + "]" if found else "(?!)")

    def escaped(self, value: Any) -> Any:
        """The value with control tokens replaced in every text inside it.

        Raises:
            DataError: it contains a character that stands for one.
        """
        if isinstance(value, str):
            if value.isascii() and not self.pattern.search(value):
                return value
            if clash := self._used.search(value):
                raise DataError(
                    f"a text contains the private-use character U+{ord(clash[0]):X}", remedy="take it out of the row"
                )
            return self.pattern.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self.escaped(key): self.escaped(item) for key, item in value.items()}
        return [self.escaped(item) for item in value] if isinstance(value, (list, tuple)) else value

    def is_escaped(self, text: str) -> bool:
        """Whether anything stands for a control token in it."""
        return not text.isascii() and self._used.search(text) is not None

    def restored(self, text: str) -> str:
        """The text as it was written."""
        return text.translate(self._tokens)


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer: Any) -> ControlTokens:
    """Those of a tokenizer, which must get no further ones afterwards."""
    return ControlTokens(tokenizer)


def render(tokenizer: Any, messages: Sequence[Message], *, answering: bool, tools: Tools = ()) -> str:
    """The chat template's text; ``answering`` adds what opens an assistant turn.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses these messages or leaves out tools or calls
            of them, or a message contains a character that is needed here.
        ModelError: the template does not come to an end. That is no fault of a row, so no further one is tried.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template", remedy="use a chat model, or set model.chat_template=chatml"
        )
    control = control_tokens(tokenizer)
    try:
        with Bounded(_ENDLESS):
            text: str = tokenizer.apply_chat_template(
                [control.escaped(message.as_dict()) for message in messages],
                tools=control.escaped(list(tools)) or None,
                tokenize=False,
                add_generation_prompt=answering,
            )
    except AlignmentError:
        raise
    except Exception as error:  # templates raise whatever they like
        raise DataError(f"the chat template refuses these messages: {error}") from error
    _refuse_lost_tools(text, messages, tools)
    return text


def _refuse_lost_tools(text: str, messages: Sequence[Message], tools: Tools) -> None:
    """Most templates know nothing of tools and pass over them, so a model would learn to say nothing."""
    for call in (*tools, *(call for message in messages for call in message.tool_calls)):
        name = str(call["function"]["name"])
        if json.dumps(name, ensure_ascii=False)[1:-1] not in text and name not in text:
            raise DataError(
                f"the chat template leaves out the tool '{name}'",
                remedy="use a model whose template knows tools, or rows without them",
            )


def conversation_pieces(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> list[Piece]:
    """What is read and each assistant turn, in turn, up to the end of the last assistant turn.

    Raises:
        DataError: no assistant turn to learn from, or a template that cannot be cut at turns.
    """
    pieces: list[Piece] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if index == 0:
            raise DataError("begins with a turn of the assistant, to which nobody has said anything")
        before = render(tokenizer, messages[:index], answering=True, tools=tools)
        if not before.startswith(rendered):
            raise DataError(
                "the chat template renders earlier turns differently once a turn follows them, as those do that drop "
                "earlier thoughts",
                remedy=f"{_KEEPS_TURNS}; rows with one answer need neither",
            )
        answer = _answer_behind(before, tokenizer, messages[:index], message, tools)
        pieces += [Piece(text=before[len(rendered) :], learned=False), Piece(text=answer, learned=message.learned)]
        rendered = before + answer
    if not any(piece.learned for piece in pieces):
        raise DataError("no assistant turn to learn from")
    return pieces


def prompt_text(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> str:
    """A prompt, ready for an answer."""
    return render(tokenizer, messages, answering=True, tools=tools)


def answer_text(tokenizer: Any, messages: Sequence[Message], answer: str, tools: Tools = ()) -> str:
    """An assistant's answer to ``messages``, up to and including the end of the turn.

    Raises:
        DataError: the template renders the prompt differently once an answer follows, or never ends the turn.
    """
    return answer_texts(tokenizer, messages, [answer], tools)[0]


def answer_texts(tokenizer: Any, messages: Sequence[Message], answers: Sequence[str], tools: Tools = ()) -> list[str]:
    """Several answers to the same ``messages``, each as ``answer_text`` gives it."""
    before = prompt_text(tokenizer, messages, tools)
    said = [Message(role="assistant", content=answer) for answer in answers]
    return [_answer_behind(before, tokenizer, messages, answer, tools) for answer in said]


def _answer_behind(before: str, tokenizer: Any, messages: Sequence[Message], answer: Message, tools: Tools) -> str:
    after = render(tokenizer, [*messages, answer], answering=False, tools=tools)
    if not after.startswith(before):
        raise DataError("the chat template renders a prompt differently once an answer follows it", remedy=_KEEPS_TURNS)
    text = after[len(before) :]
    return text[: _turn_end(tokenizer, text)]


def _turn_end(tokenizer: Any, text: str) -> int:
    """Where the turn ends: behind EOS, or behind the control token that the template puts there instead (Gemma).

    What follows (a line break in ChatML) belongs to no answer.
    """
    found = list(control_tokens(tokenizer).pattern.finditer(text))
    for match in reversed(found):
        if match[0] == tokenizer.eos_token:
            return match.end()
    if not found or text[found[-1].end() :].strip():
        raise DataError("the chat template does not end an assistant turn with EOS or another control token")
    return found[-1].end()


def prompt_tail(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> str | None:
    """What the template puts behind the last turn's content, found by a character in its place; None if it is lost.

    Raises:
        DataError: see ``render``.
    """
    mark = control_tokens(tokenizer).unused
    said = prompt_text(tokenizer, [*messages[:-1], replace(messages[-1], content=mark)], tools)
    before, found, tail = said.partition(mark)
    return tail if found and before and mark not in tail else None
