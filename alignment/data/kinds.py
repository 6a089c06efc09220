"""What becomes of a record of each kind: pieces of text, then rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.limits import Limits, Parts, RowTooLong, fitted
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, PreferencePair, Prompt
from alignment.data.templates import Piece, Tools, answer_texts, conversation_pieces, prompt_tail, prompt_text
from alignment.data.tokenize import Tokens, escaped_text, text_rows, tokens_of
from alignment.data.turns import Message
from alignment.errors import DataError

PROMPT, TAIL = "prompt", "tail"
"""Names of pieces; all others are answers."""

Texts = dict[str, list[Piece]]
Row = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """``texts`` renders a record, ``rows`` makes token ids of its parts; ``columns`` are what these rows have.

    Raises:
        DataError: from ``texts``, where the record cannot be rendered.
    """

    name: str
    record: type[Any]
    columns: tuple[str, ...]
    texts: Callable[[Any, Any, Limits], Texts]
    rows: Callable[[Any, Parts, Limits], list[Row]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """What a record gave: its ``parts`` within the limits with their ``rows``, or the ``fault`` that it has no rows.

    ``tokens`` is the length of its longest sequence before anything was cut, and ``cut`` says what was.
    """

    record: Any
    rows: Sequence[Row] = ()
    parts: Parts | None = None
    fault: DataError | None = None
    tokens: int = 0
    cut: str = ""


def tokenized(tokenizer: Any, kind: Kind, records: Sequence[Any], limits: Limits) -> Iterator[Tokenized]:
    """Each record's rows, in order. All are encoded at once, so hand over some hundreds, not a million."""
    rendered: list[Texts | DataError] = []
    for record in records:
        try:
            rendered.append(kind.texts(tokenizer, record, limits))
        except DataError as fault:
            rendered.append(_placed(fault, record.where))
    encoded = iter(
        tokens_of(tokenizer, [pieces for one in rendered if isinstance(one, dict) for pieces in one.values()])
    )
    for record, texts in zip(records, rendered, strict=True):
        if isinstance(texts, DataError):
            yield Tokenized(record=record, fault=texts)
            continue
        whole = _parts({name: next(encoded) for name in texts})
        try:
            parts, cut = (whole, "") if kind is TEXTS else fitted(whole, limits)
        except RowTooLong as reason:
            yield Tokenized(record=record, fault=_placed(reason, record.where), tokens=whole.longest)
        else:
            rows = kind.rows(tokenizer, parts, limits)
            yield Tokenized(record=record, rows=rows, parts=parts, tokens=whole.longest, cut=cut)


def _placed(fault: DataError, where: str) -> DataError:
    return type(fault)(fault.message, where=where, remedy=fault.remedy)


def _parts(named: Mapping[str, Tokens]) -> Parts:
    none = Tokens(ids=[], learned=[])
    tail = named.get(TAIL, none)
    answers = {name: tokens for name, tokens in named.items() if name not in (PROMPT, TAIL)}
    return Parts(prompt=named.get(PROMPT, none) + tail, answers=answers, tail=len(tail))


def _prompt_texts(
    tokenizer: Any, read: list[Piece], messages: Sequence[Message], limits: Limits, *, learned: bool = False
) -> Texts:
    """The prompt in one, or without the tail that must outlive a cut from the right."""
    count = prompt_tail(tokenizer, read[-1].text, messages) if limits.keeps_tail else 0
    if not count:
        return {PROMPT: read}
    text = read[-1].text
    return {
        PROMPT: [*read[:-1], Piece(text=text[:-count], learned=learned)],
        TAIL: [Piece(text=text[-count:], learned=learned)],
    }


# ---- conversations --------------------------------------------------------------------------------------------------


def _conversation_texts(tokenizer: Any, record: Conversation, limits: Limits) -> Texts:
    pieces = conversation_pieces(tokenizer, record.messages, record.tools)
    last = max(place for place, message in enumerate(record.messages) if message.role == "assistant")
    return {**_prompt_texts(tokenizer, pieces[:-1], record.messages[:last], limits), "answer": pieces[-1:]}


def _conversation_rows(_: Any, parts: Parts, __: Limits) -> list[Row]:
    whole = parts.prompt + parts.answers["answer"]
    return [{"input_ids": whole.ids, "labels": whole.labels}]


# ---- pairs and prompts ----------------------------------------------------------------------------------------------


def _read(tokenizer: Any, messages: Sequence[Message], tools: Tools, limits: Limits) -> Texts:
    text = prompt_text(tokenizer, messages, tools)
    return _prompt_texts(tokenizer, [Piece(text=text, learned=False)], messages, limits)


def _pair_texts(tokenizer: Any, record: PreferencePair, limits: Limits) -> Texts:
    told = (record.chosen, record.rejected)
    chosen, rejected = answer_texts(tokenizer, record.messages, told, record.tools)
    return {
        **_read(tokenizer, record.messages, record.tools, limits),
        "chosen": [Piece(text=chosen, learned=True)],
        "rejected": [Piece(text=rejected, learned=True)],
    }


def _pair_rows(_: Any, parts: Parts, __: Limits) -> list[Row]:
    return [{PROMPT: parts.prompt.ids, **{name: tokens.ids for name, tokens in parts.answers.items()}}]


def _prompt_only_texts(tokenizer: Any, record: Prompt | HeldOutPrompt, limits: Limits) -> Texts:
    return _read(tokenizer, record.messages, getattr(record, "tools", ()), limits)


# ---- texts ----------------------------------------------------------------------------------------------------------


def _plain_texts(tokenizer: Any, record: PlainText, _: Limits) -> Texts:
    return {"text": [Piece(text=escaped_text(tokenizer, record.text), learned=True)]}


def _plain_rows(tokenizer: Any, parts: Parts, limits: Limits) -> list[Row]:
    rows = text_rows(tokenizer, parts.answers["text"].ids, max_length=limits.row)
    return [{"input_ids": row, "labels": row} for row in rows]


_LEARNED = ("input_ids", "labels")
CONVERSATIONS = Kind(
    name="conversation",
    record=Conversation,
    columns=_LEARNED,
    texts=_conversation_texts,
    rows=_conversation_rows,
)
PAIRS = Kind(
    name="pair",
    record=PreferencePair,
    columns=(PROMPT, "chosen", "rejected"),
    texts=_pair_texts,
    rows=_pair_rows,
)
PROMPTS = Kind(name="prompt", record=Prompt, columns=(PROMPT,), texts=_prompt_only_texts, rows=_pair_rows)
TEXTS = Kind(name="text", record=PlainText, columns=_LEARNED, texts=_plain_texts, rows=_plain_rows)
"""Of any length: a text is cut into rows."""
KINDS = {"cpt": TEXTS, "sft": CONVERSATIONS, "reward": PAIRS, "dpo": PAIRS, "ppo": PROMPTS}
"""What each kind of stage learns from."""
