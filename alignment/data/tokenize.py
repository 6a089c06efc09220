"""Messages → token ids, and which of them are learned.

A conversation is rendered once with the tokenizer's own chat template. What is learned is found by rendering prefixes:
an assistant turn is what its prefix adds to the prefix with a generation prompt, up to and including the token that
ends the turn. Nothing is ever inferred from token ids, because pad may equal EOS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from alignment.data.records import Record
from alignment.data.turns import Message
from alignment.errors import DataError

IGNORED = -100

R = TypeVar("R", bound=Record)
Tokens = TypeVar("Tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedConversation:
    """``labels`` equal ``input_ids`` on learned tokens and are -100 elsewhere.

    Example (turns of one token): ``input_ids [1 7 2 1 9 2]``, ``labels [-100 -100 -100 -100 9 2]``.
    """

    input_ids: list[int]
    labels: list[int]


Tools = Sequence[Mapping[str, Any]]
"""What the assistant may call, as chat templates take it."""


def render(tokenizer: Any, messages: Sequence[Message], *, answering: bool, tools: Tools = ()) -> str:
    """The chat template's text; ``answering`` adds what opens an assistant turn.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses these messages or leaves out tools or calls
            of them, or a message contains text that would become a control token.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template", remedy="use a chat model, or add a template to its folder"
        )
    _refuse_control_tokens(tokenizer, messages)
    try:
        text: str = tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=answering,
        )
    except Exception as error:  # templates raise whatever they like
        raise DataError(f"the chat template refuses these messages: {error}") from error
    _refuse_lost_tools(text, messages, tools)
    return text


def _refuse_lost_tools(text: str, messages: Sequence[Message], tools: Tools) -> None:
    """Most templates know nothing of tools and pass over them, so a model would learn to say nothing."""
    for call in (*tools, *(call for message in messages for call in message.tool_calls)):
        if str(call["function"]["name"]) not in text:
            raise DataError(
                f"the chat template leaves out the tool '{call['function']['name']}'",
                remedy="use a model whose template knows tools, or rows without them",
            )


def _refuse_control_tokens(tokenizer: Any, messages: Sequence[Message]) -> None:
    """Otherwise a row could end its own turn and go on as somebody else."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for message in messages:
        said = message.content + json.dumps(list(message.tool_calls), ensure_ascii=False)
        for token in control:
            if token in said:
                raise DataError(
                    f"a message of the {message.role} contains the control token '{token}'",
                    remedy="take it out of the row, or write it otherwise",
                )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of already rendered text: nothing is added to it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
    """Token ids of a prompt, ready for an answer."""
    return encode(tokenizer, render(tokenizer, messages, answering=True, tools=tools))


def answer_ids(tokenizer: Any, messages: Sequence[Message], answer: str, tools: Tools = ()) -> list[int]:
    """Token ids of an assistant's answer to ``messages``, up to and including the end of the turn.

    Raises:
        DataError: the template renders the prompt differently once an answer follows, or never ends the turn.
    """
    return encode(tokenizer, _answer_text(tokenizer, messages, Message(role="assistant", content=answer), tools))


def tokenize_conversation(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> TokenizedConversation:
    """A whole conversation with every assistant turn learned, its end included, but for those that say otherwise.

    Raises:
        DataError: no assistant turn to learn from, or a template that cannot be cut at turns.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(tokenizer, messages[:index], answering=True, tools=tools)
        if not before.startswith(rendered):
            raise DataError("the chat template renders earlier turns differently once a turn follows them")
        context = encode(tokenizer, before[len(rendered) :])
        text = _answer_text(tokenizer, messages[:index], message, tools)
        answer = encode(tokenizer, text)
        input_ids += context + answer
        labels += [IGNORED] * len(context) + (answer if message.learned else [IGNORED] * len(answer))
        rendered = before + text
    if all(label == IGNORED for label in labels):
        raise DataError("no assistant turn to learn from")
    return TokenizedConversation(input_ids=input_ids, labels=labels)


def tokenize_text(tokenizer: Any, text: str, *, max_length: int) -> list[TokenizedConversation]:
    """A text as rows of at most ``max_length`` tokens, all of them learned; the last one ends with EOS.

    It begins as the tokenizer begins texts: with BOS, or with nothing.

    Raises:
        DataError: the text contains a control token.
    """
    _refuse_control_tokens(tokenizer, [Message(role="text", content=text)])
    ids = tokenizer(text)["input_ids"]
    ids = [*(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids), tokenizer.eos_token_id]
    rows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [TokenizedConversation(input_ids=row, labels=row) for row in rows]


def tokenize_rows(records: Iterable[R], tokenize: Callable[[R], Tokens]) -> list[Tokens]:
    """``tokenize`` applied to each record.

    Raises:
        DataError: the first row that cannot be tokenised, by its place.
    """
    rows = []
    for record in records:
        try:
            rows.append(tokenize(record))
        except DataError as error:
            raise DataError(error.message, where=record.where, remedy=error.remedy) from error
    return rows


def _answer_text(tokenizer: Any, messages: Sequence[Message], answer: Message, tools: Tools) -> str:
    before = render(tokenizer, messages, answering=True, tools=tools)
    after = render(tokenizer, [*messages, answer], answering=False, tools=tools)
    if not after.startswith(before):
        raise DataError("the chat template renders a prompt differently once an answer follows it")
    text, end = after[len(before) :], tokenizer.eos_token
    if end not in text:
        raise DataError("the chat template does not end an assistant turn with the tokenizer's EOS token")
    # What follows the turn's end (a line break in ChatML) belongs to no answer.
    return text[: text.rindex(end) + len(end)]
