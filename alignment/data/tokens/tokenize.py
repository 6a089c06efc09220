"""Turns rendered text into token ids, and marks those that are learned (rendering.py defines what a turn is)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from alignment.core.errors import DataError
from alignment.data.records import Record
from alignment.data.tokens.rendering import (
    Segment,
    Tools,
    control_tokens,
    conversation_texts,
    prompt_and_answers,
    prompt_and_bare_answers,
    prompt_text,
    turn_end_token,
)
from alignment.data.turns import Message

IGNORED = -100
_PASSES_ON = ("transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers")
"""The modules of ``__call__`` and ``_encode_plus`` of a tokenizer that passes texts on."""
STOPS = "alignment_stop_ids"
"""The attribute of a tokenizer that holds the tokens, beside EOS, at which its model stops."""
R = TypeVar("R", bound=Record)
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedConversation:
    """``labels`` equal ``input_ids`` on learned tokens and are -100 elsewhere. Example (turns of one token):
    ``input_ids [1 7 2 1 9 2]``, ``labels [-100 -100 -100 -100 9 2]``."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Token ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(ids=self.ids + other.ids, learned=self.learned + other.learned)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(ids=self.ids[part], learned=self.learned[part])

    @property
    def labels(self) -> list[int]:
        """The ids of learned tokens, -100 elsewhere."""
        if True not in self.learned:
            return [IGNORED] * len(self.ids)
        if False not in self.learned:
            return list(self.ids)
        return [token if learned else IGNORED for token, learned in zip(self.ids, self.learned, strict=True)]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text; nothing is added to it."""
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """``encode`` of many texts at once, which is several times faster."""
    control = control_tokens(tokenizer)
    escaped = [index for index, text in enumerate(texts) if control.is_escaped(text)]
    if not texts:
        return []
    ids = _encoded(tokenizer, list(texts))
    for index in escaped:
        ids[index] = _encode_escaped(tokenizer, texts[index])
    return ids


def encode_after(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """``encode`` of each second text as it is behind the first, which may be empty. Tokenizers of SentencePiece put a
    space before every text that they are given. Behind another text of the same row, that space would be in no text
    that is tokenised whole, such as a prompt or a row of another program. Where a token reaches into both texts, the
    second is encoded by itself."""
    alone = encode_all(tokenizer, [text for _, text in texts])
    if not _changes_beginnings(tokenizer):
        return alone
    before = encode_all(tokenizer, [first for first, _ in texts])
    both = encode_all(tokenizer, [first + second for first, second in texts])
    return [
        whole[len(first) :] if text and whole[: len(first)] == first else ids
        for (text, _), ids, first, whole in zip(texts, alone, before, both, strict=True)
    ]


def encode_parts(tokenizer: Any, parts: Sequence[str]) -> list[list[int]]:
    """``encode_after`` of texts that follow each other."""
    return encode_after(tokenizer, list(zip(["", *parts], parts, strict=False)))


@functools.lru_cache(maxsize=16)
def _changes_beginnings(tokenizer: Any) -> bool:
    """Whether a text has other tokens by itself than behind another one."""
    first, second, both = _encoded(tokenizer, ["\n", "a", "\na"])
    return first + second != both


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids that ``tokenizer(texts, add_special_tokens=False)`` gives. transformers asks the library ``tokenizers``
    for them, with the position of every token in its text, and copies the answer several times. Asked directly and for
    ids alone, the library takes about two thirds of the time."""
    if not _only_asks_backend(type(tokenizer)):
        ids_only = {"return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, **ids_only)["input_ids"]
        return ids
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _only_asks_backend(kind: Any) -> bool:
    """Whether tokenizers of this class do nothing else with a text than to pass it on. Then both methods are those of
    transformers' own class, which is told by its module: this one must not import it."""
    methods = (getattr(kind, "__call__", None), getattr(kind, "_encode_plus", None))  # noqa: B004 - the function itself
    return tuple(getattr(method, "__module__", "") for method in methods) == _PASSES_ON


def _encode_escaped(tokenizer: Any, text: str) -> list[int]:
    """Encodes the template's control tokens as such, and everything between them as text, whatever it looks like."""
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


def tokens_of(
    tokenizer: Any, segments_of_rows: Sequence[Sequence[Segment]], before: Sequence[str] | None = None
) -> list[Tokens]:
    """The tokens of each row, a list of segments that stand behind the text ``before`` it; all are encoded at once."""
    pairs: list[tuple[str, str]] = []
    for first, segments in zip(before or [""] * len(segments_of_rows), segments_of_rows, strict=True):
        texts = [segment.text for segment in segments]
        pairs += zip([first, *texts], texts, strict=False)
    encoded = iter(encode_after(tokenizer, pairs))
    rows = []
    for segments in segments_of_rows:
        row = Tokens(ids=[], learned=[])
        for segment in segments:
            ids = next(encoded)
            row.ids.extend(ids)
            row.learned.extend([segment.learned] * len(ids))
        rows.append(row)
    return rows


def prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
    return encode(tokenizer, prompt_text(tokenizer, messages, tools))


def answer_ids(tokenizer: Any, messages: Sequence[Message], answer: str, tools: Tools = ()) -> list[int]:
    """Token ids of an assistant's answer to ``messages``, up to and including the end of the turn. Raises DataError: as
    ``prompt_and_answers``."""
    turn = Message(role="assistant", content=answer)
    prompt, text = prompt_and_answers(tokenizer, messages, [turn], tools)
    return encode_after(tokenizer, [(prompt, text)])[0]


def prompt_and_choice_ids(
    tokenizer: Any, messages: Sequence[Message], choices: Sequence[str], tools: Tools = ()
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of the text alone of each of several answers to it (``prompt_and_bare_answers``).
    Raises DataError: as ``prompt_and_bare_answers``."""
    prompt, *texts = prompt_and_bare_answers(tokenizer, messages, choices, tools)
    return encode(tokenizer, prompt), encode_after(tokenizer, [(prompt, text) for text in texts])


@functools.lru_cache(maxsize=16)
def turn_end_id(tokenizer: Any) -> int:
    """The token that ends an answer, which is EOS in most chat templates and ``<end_of_turn>`` in Gemma's. Raises
    DataError: see ``turn_end_token``."""
    return control_tokens(tokenizer).ids[turn_end_token(tokenizer)]


def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer. They are the one that ends a turn, EOS, which a base model may emit instead, and
    those that the model's generation_config.json names. Raises DataError: see ``turn_end_token``."""
    return frozenset({turn_end_id(tokenizer), tokenizer.eos_token_id, *getattr(tokenizer, STOPS, ())})


def tokenize_conversation(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> TokenizedConversation:
    """A whole conversation with every assistant turn and its end learned, except turns that are not to be learned. The
    template must keep earlier turns as they were. Raises DataError: there is no assistant turn to learn from, or the
    rendered text cannot be cut at turns."""
    (row,) = tokens_of(tokenizer, [text.segments for text in conversation_texts(tokenizer, messages, tools)])
    return TokenizedConversation(input_ids=row.ids, labels=row.labels)


def escaped_text(tokenizer: Any, text: str) -> str:
    """Plain text ready for ``encode``: control tokens in it stay text."""
    return str(control_tokens(tokenizer).escaped(text))


def text_rows(tokenizer: Any, ids: list[int], *, max_length: int) -> list[list[int]]:
    """A text's tokens with the tokenizer's prefix, if any, and EOS, cut into rows of at most ``max_length``."""
    whole = [*front(tokenizer), *ids, tokenizer.eos_token_id]
    return [whole[start : start + max_length] for start in range(0, len(whole), max_length)]


@functools.lru_cache(maxsize=16)
def front(tokenizer: Any) -> tuple[int, ...]:
    """The prefix that the tokenizer adds to texts: BOS, or nothing."""
    whole, bare = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    return tuple(whole[: starts[0]]) if starts else ()


def tokenize_rows(records: Iterable[R], tokenize: Callable[[R], Row]) -> list[Row]:
    """``tokenize`` applied to each record. Raises DataError: a row cannot be tokenised; the error gives the location of
    the first one."""
    rows = []
    for record in records:
        try:
            rows.append(tokenize(record))
        except DataError as error:
            raise DataError(error.message, where=record.where, remedy=error.remedy) from error
    return rows
