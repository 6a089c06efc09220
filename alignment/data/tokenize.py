"""Messages → token ids, and which of them are learned.

A conversation is rendered once with the tokenizer's own chat template. What is learned is found by rendering prefixes:
an assistant turn is what its prefix adds to the prefix with a generation prompt, up to and including the token that
ends the turn. Nothing is ever inferred from token ids, because pad may equal EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignment.data.records import Message
from alignment.errors import DataError

IGNORED = -100

Record = TypeVar("Record")
Tokens = TypeVar("Tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedConversation:
    """``labels`` equal ``input_ids`` on learned tokens and are -100 elsewhere.

    Example (turns of one token): ``input_ids [1 7 2 1 9 2]``, ``labels [-100 -100 -100 -100 9 2]``.
    """

    input_ids: list[int]
    labels: list[int]


def render(tokenizer: Any, messages: Sequence[Message], *, answering: bool) -> str:
    """The chat template's text; ``answering`` adds what opens an assistant turn.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses these messages, or a message contains
            text that would become a control token.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template", remedy="use a chat model, or add a template to its folder"
        )
    _refuse_control_tokens(tokenizer, messages)
    try:
        return tokenizer.apply_chat_template(
            [message.as_dict() for message in messages], tokenize=False, add_generation_prompt=answering
        )
    except Exception as error:  # templates raise whatever they like
        raise DataError(f"the chat template refuses these messages: {error}") from error


def _refuse_control_tokens(tokenizer: Any, messages: Sequence[Message]) -> None:
    """Otherwise a row could end its own turn and go on as somebody else."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for message in messages:
        for token in control:
            if token in message.content:
                raise DataError(
                    f"a message of the {message.role} contains the control token '{token}'",
                    remedy="take it out of the row, or write it otherwise",
                )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of already rendered text: nothing is added to it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, ready for an answer."""
    return encode(tokenizer, render(tokenizer, messages, answering=True))


def answer_ids(tokenizer: Any, messages: Sequence[Message], answer: str) -> list[int]:
    """Token ids of an assistant's answer to ``messages``, up to and including the end of the turn.

    Raises:
        DataError: the template renders the prompt differently once an answer follows, or never ends the turn.
    """
    return encode(tokenizer, _answer_text(tokenizer, messages, answer))


def tokenize_conversation(tokenizer: Any, messages: Sequence[Message]) -> TokenizedConversation:
    """A whole conversation with every assistant turn learned, its end included.

    Raises:
        DataError: no assistant turn, or a template that cannot be cut at turns.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(tokenizer, messages[:index], answering=True)
        if not before.startswith(rendered):
            raise DataError("the chat template renders earlier turns differently once a turn follows them")
        context = encode(tokenizer, before[len(rendered) :])
        text = _answer_text(tokenizer, messages[:index], message.content)
        answer = encode(tokenizer, text)
        input_ids += context + answer
        labels += [IGNORED] * len(context) + answer
        rendered = before + text
    if not input_ids:
        raise DataError("no assistant turn to learn from")
    return TokenizedConversation(input_ids=input_ids, labels=labels)


def tokenize_rows(path: Path, records: Iterable[Record], tokenize: Callable[[Record], Tokens]) -> list[Tokens]:
    """``tokenize`` applied to each record of a file.

    Raises:
        DataError: the first row that cannot be tokenised, by its number.
    """
    rows = []
    for number, record in enumerate(records, start=1):
        try:
            rows.append(tokenize(record))
        except DataError as error:
            raise DataError(error.message, where=f"{path}: row {number}", remedy=error.remedy) from error
    return rows


def _answer_text(tokenizer: Any, messages: Sequence[Message], answer: str) -> str:
    before = render(tokenizer, messages, answering=True)
    after = render(tokenizer, [*messages, Message(role="assistant", content=answer)], answering=False)
    if not after.startswith(before):
        raise DataError("the chat template renders a prompt differently once an answer follows it")
    text, end = after[len(before) :], tokenizer.eos_token
    if end not in text:
        raise DataError("the chat template does not end an assistant turn with the tokenizer's EOS token")
    # What follows the turn's end (a line break in ChatML) belongs to no answer.
    return text[: text.rindex(end) + len(end)]
