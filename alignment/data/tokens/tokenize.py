"""Rendered text → token ids, and which of them are learned (alignment/data/tokens/rendering.py says what a turn is)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from alignment.core.errors import DataError
from alignment.data.records import Record
from alignment.data.tokens.rendering import (
    Piece,
    Tools,
    answer_text,
    control_tokens,
    conversation_pieces,
    prompt_text,
)
from alignment.data.turns import Message

IGNORED = -100
STOPS = "alignment_stop_ids"
"""Where a tokenizer keeps the tokens at which its model stops beside EOS."""

R = TypeVar("R", bound=Record)
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedConversation:
    """``labels`` equal ``input_ids`` on learned tokens and are -100 elsewhere.

    Example (turns of one token): ``input_ids [1 7 2 1 9 2]``, ``labels [-100 -100 -100 -100 9 2]``.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Token ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.ids)

    def __add__(self, other: Tokens) -> Tokens:
        """These, then those."""
        return Tokens(ids=self.ids + other.ids, learned=self.learned + other.learned)

    def __getitem__(self, part: slice) -> Tokens:
        """Some of them."""
        return Tokens(ids=self.ids[part], learned=self.learned[part])

    @property
    def labels(self) -> list[int]:
        """The ids of learned tokens, -100 elsewhere."""
        return [token if learned else IGNORED for token, learned in zip(self.ids, self.learned, strict=True)]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of already rendered text: nothing is added to it."""
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """``encode`` of many texts at once, which is several times as fast."""
    control = control_tokens(tokenizer)
    escaped = [place for place, text in enumerate(texts) if control.is_escaped(text)]
    if not texts:
        return []
    ids_only = {"return_attention_mask": False, "return_token_type_ids": False}
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, **ids_only)["input_ids"]
    for place in escaped:
        found[place] = _encode_escaped(tokenizer, texts[place])
    return found


def _encode_escaped(tokenizer: Any, text: str) -> list[int]:
    """The template's control tokens as such, what is written between them as text, whatever it looks like."""
    control = control_tokens(tokenizer)
    ids: list[int] = []
    end = 0
    for match in [*control.pattern.finditer(text), None]:
        between = control.restored(text[end : match.start() if match else None])
        if between:
            ids += tokenizer(between, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if match:
            ids.append(control.ids[match[0]])
            end = match.end()
    return ids


def tokens_of(tokenizer: Any, many: Sequence[Sequence[Piece]]) -> list[Tokens]:
    """The tokens of each row of pieces, all encoded at once."""
    encoded = iter(encode_all(tokenizer, [piece.text for pieces in many for piece in pieces]))
    found = []
    for pieces in many:
        row = Tokens(ids=[], learned=[])
        for piece in pieces:
            ids = next(encoded)
            row.ids.extend(ids)
            row.learned.extend([piece.learned] * len(ids))
        found.append(row)
    return found


def prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
    """Token ids of a prompt, ready for an answer."""
    return encode(tokenizer, prompt_text(tokenizer, messages, tools))


def answer_ids(tokenizer: Any, messages: Sequence[Message], answer: str, tools: Tools = ()) -> list[int]:
    """Token ids of an assistant's answer to ``messages``, up to and including the end of the turn.

    Raises:
        DataError: the template renders the prompt differently once an answer follows, or never ends the turn.
    """
    return encode(tokenizer, answer_text(tokenizer, messages, answer, tools))


@functools.lru_cache(maxsize=16)
def turn_end_id(tokenizer: Any) -> int:
    """The token that ends an answer, which is EOS in most chat templates and ``<end_of_turn>`` in Gemma's.

    Raises:
        DataError: see ``answer_ids``.
    """
    return answer_ids(tokenizer, [Message(role="user", content="Hi.")], "Hello.")[-1]


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens at which an answer is over: the one that ends a turn, EOS, which a base model may say instead, and
    those that the model's own generation_config.json names.

    Raises:
        DataError: see ``answer_ids``.
    """
    return frozenset({turn_end_id(tokenizer), tokenizer.eos_token_id, *getattr(tokenizer, STOPS, ())})


def tokenize_conversation(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> TokenizedConversation:
    """A whole conversation with every assistant turn learned, its end included, but for those that say otherwise.

    Raises:
        DataError: no assistant turn to learn from, or a template that cannot be cut at turns.
    """
    (row,) = tokens_of(tokenizer, [conversation_pieces(tokenizer, messages, tools)])
    return TokenizedConversation(input_ids=row.ids, labels=row.labels)


def escaped_text(tokenizer: Any, text: str) -> str:
    """Plain text ready for ``encode``: control tokens in it stay text."""
    return str(control_tokens(tokenizer).escaped(text))


def text_rows(tokenizer: Any, ids: list[int], *, max_length: int) -> list[list[int]]:
    """A text's tokens between what the tokenizer puts in front of texts, if anything, and EOS, cut into rows."""
    whole = [*front(tokenizer), *ids, tokenizer.eos_token_id]
    return [whole[start : start + max_length] for start in range(0, len(whole), max_length)]


@functools.lru_cache(maxsize=16)
def front(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts in front of texts: BOS, or nothing."""
    whole, bare = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    starts = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return tuple(whole[: starts[0]]) if starts else ()


def tokenize_rows(records: Iterable[R], tokenize: Callable[[R], Row]) -> list[Row]:
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
