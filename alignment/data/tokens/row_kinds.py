"""Turns a record of each kind into text segments, then into rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.core.deadline import watched
from alignment.core.errors import DataError, ModelError
from alignment.data.records import Conversation, LabelledAnswer, PlainText, PreferencePair, Prompt
from alignment.data.tokens.limits import Limits, Parts, RowTooLong, cut_to, excess
from alignment.data.tokens.rendering import (
    Segment,
    Tools,
    answer_texts,
    conversation_segments,
    prompt_tail,
    prompt_text,
)
from alignment.data.tokens.tokenize import Tokens, encode, escaped_text, front, text_rows, tokens_of
from alignment.data.turns import Message

PROMPT = "prompt"
"""The name of a row's prompt; all other texts are answers."""
DESIRABLE, UNDESIRABLE = "desirable", "undesirable"
"""The names of labelled answers."""
MARGIN = "margin"
"""The column with a pair's difference of scores, which no model takes."""

Texts = dict[str, list[Segment]]
Row = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How records of one type become rows.

    ``texts`` renders a record, ``rows`` makes rows of token ids with the ``columns`` of its parts. ``asked`` gives the
    messages and tools of the prompt. ``numbers`` are further columns, with a number of the record in each.

    Raises:
        DataError: from ``texts``, if the record cannot be rendered or lacks a number.
    """

    name: str
    record: type[Any]
    columns: tuple[str, ...]
    texts: Callable[[Any, Any], Texts]
    asked: Callable[[Any], tuple[Sequence[Message], Tools]]
    rows: Callable[[Any, Parts, Limits], list[Row]]
    numbers: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Columns of token ids, then those of numbers."""
        return (*self.columns, *self.numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """A tokenised record: its ``parts`` within the limits and their ``rows``, or the ``fault`` for which it has no
    rows.

    ``tokens`` is the length of its longest sequence before cutting, and ``cut`` describes what was cut.
    """

    record: Any
    rows: Sequence[Row] = ()
    parts: Parts | None = None
    fault: DataError | None = None
    tokens: int = 0
    cut: str = ""


def tokenized(tokenizer: Any, kind: Kind, records: Sequence[Any], limits: Limits) -> Iterator[Tokenized]:
    """Yields each record's rows in order. All records are encoded at once, so pass some hundreds, not a million."""
    with watched():
        rendered = [_rendered(tokenizer, kind, record) for record in records]
    encoded = iter(
        tokens_of(tokenizer, [segments for texts in rendered if isinstance(texts, dict) for segments in texts.values()])
    )
    for record, texts in zip(records, rendered, strict=True):
        if isinstance(texts, DataError):
            yield Tokenized(record=record, fault=texts)
            continue
        whole = _parts({name: next(encoded) for name in texts})
        try:
            parts, cut = _fitted(tokenizer, kind, record, whole, limits)
        except RowTooLong as reason:
            yield Tokenized(record=record, fault=_placed(reason, record.where), tokens=whole.longest)
        else:
            rows = kind.rows(tokenizer, parts, limits)
            yield Tokenized(record=record, rows=rows, parts=parts, tokens=whole.longest, cut=cut)


def _rendered(tokenizer: Any, kind: Kind, record: Any) -> Texts | DataError:
    """The record's texts, or its fault.

    Raises:
        ModelError: the template does not terminate.
    """
    try:
        return kind.texts(tokenizer, record)
    except DataError as fault:
        return _placed(fault, record.where)
    except ModelError as error:
        raise ModelError(error.message, where=record.where, remedy=error.remedy) from error


def _fitted(tokenizer: Any, kind: Kind, record: Any, whole: Parts, limits: Limits) -> tuple[Parts, str]:
    """The parts within their limits, and a description of what was cut; a text may have any length.

    Raises:
        RowTooLong: the parts are too long, and rows are not cut or this row cannot be.
    """
    over = "" if kind is TEXTS else excess(whole, limits)
    if not over:
        return whole, ""
    if not limits.cuts:
        raise RowTooLong(over)
    tail = _tail(tokenizer, kind, record, whole.prompt.ids)
    if tail is None:
        raise RowTooLong(f"{over}; the end of the last turn in the prompt is unknown, so it cannot be cut")
    begin = front(tokenizer)
    head = len(begin) if tuple(whole.prompt.ids[: len(begin)]) == begin else 0
    return cut_to(replace(whole, head=head, tail=tail), limits), over


def _tail(tokenizer: Any, kind: Kind, record: Any, prompt: list[int]) -> int | None:
    """Number of tokens that the template appends to the content of the prompt's last turn, or None if unknown."""
    text = prompt_tail(tokenizer, *kind.asked(record))
    ids = [] if text is None else encode(tokenizer, text)
    return len(ids) if text is not None and prompt[len(prompt) - len(ids) :] == ids else None


def _placed(fault: DataError, where: str) -> DataError:
    return type(fault)(fault.message, where=where, remedy=fault.remedy)


def _parts(named: Mapping[str, Tokens]) -> Parts:
    answers = {name: tokens for name, tokens in named.items() if name != PROMPT}
    return Parts(prompt=named.get(PROMPT, Tokens(ids=[], learned=[])), answers=answers)


# ---- conversations --------------------------------------------------------------------------------------------------


def _conversation_texts(tokenizer: Any, record: Conversation) -> Texts:
    segments = conversation_segments(tokenizer, record.messages, record.tools)
    return {PROMPT: segments[:-1], "answer": segments[-1:]}


def _before_the_last_answer(record: Conversation) -> tuple[Sequence[Message], Tools]:
    last = max(index for index, message in enumerate(record.messages) if message.role == "assistant")
    return record.messages[:last], record.tools


def _conversation_rows(_: Any, parts: Parts, __: Limits) -> list[Row]:
    whole = parts.prompt + parts.answers["answer"]
    return [{"input_ids": whole.ids, "labels": whole.labels}]


# ---- pairs, labelled answers and prompts ----------------------------------------------------------------------------


def _asked(record: PreferencePair | LabelledAnswer | Prompt) -> tuple[Sequence[Message], Tools]:
    return record.messages, record.tools


def _prompt_texts(tokenizer: Any, record: PreferencePair | LabelledAnswer | Prompt) -> Texts:
    return {PROMPT: [Segment(text=prompt_text(tokenizer, record.messages, record.tools), learned=False)]}


def _pair_texts(tokenizer: Any, record: PreferencePair) -> Texts:
    chosen, rejected = answer_texts(tokenizer, record.messages, (record.chosen, record.rejected), record.tools)
    return {
        **_prompt_texts(tokenizer, record),
        "chosen": [Segment(text=chosen, learned=True)],
        "rejected": [Segment(text=rejected, learned=True)],
    }


def _scored_pair_texts(tokenizer: Any, record: PreferencePair) -> Texts:
    record.margin()  # a pair without one has no texts
    return _pair_texts(tokenizer, record)


def _pair_rows(_: Any, parts: Parts, __: Limits) -> list[Row]:
    return [{PROMPT: parts.prompt.ids, **{name: tokens.ids for name, tokens in parts.answers.items()}}]


def _labelled_texts(tokenizer: Any, record: LabelledAnswer) -> Texts:
    (answer,) = answer_texts(tokenizer, record.messages, (record.answer,), record.tools)
    label = DESIRABLE if record.desirable else UNDESIRABLE
    return {**_prompt_texts(tokenizer, record), label: [Segment(text=answer, learned=True)]}


def _labelled_rows(_: Any, parts: Parts, __: Limits) -> list[Row]:
    """The answer is in the column of its label; the other column is empty."""
    row: Row = {PROMPT: parts.prompt.ids, DESIRABLE: [], UNDESIRABLE: []}
    return [row | {label: tokens.ids for label, tokens in parts.answers.items()}]


# ---- texts ----------------------------------------------------------------------------------------------------------


def _plain_texts(tokenizer: Any, record: PlainText) -> Texts:
    return {"text": [Segment(text=escaped_text(tokenizer, record.text), learned=True)]}


def _plain_rows(tokenizer: Any, parts: Parts, limits: Limits) -> list[Row]:
    rows = text_rows(tokenizer, parts.answers["text"].ids, max_length=limits.row)
    return [{"input_ids": row, "labels": row} for row in rows]


_LEARNED = ("input_ids", "labels")
CONVERSATIONS = Kind(
    name="conversation",
    record=Conversation,
    columns=_LEARNED,
    texts=_conversation_texts,
    asked=_before_the_last_answer,
    rows=_conversation_rows,
)
PAIRS = Kind(
    name="pair",
    record=PreferencePair,
    columns=(PROMPT, "chosen", "rejected"),
    texts=_pair_texts,
    asked=_asked,
    rows=_pair_rows,
)
LABELLED_ANSWERS = Kind(
    name="labelled answer",
    record=LabelledAnswer,
    columns=(PROMPT, DESIRABLE, UNDESIRABLE),
    texts=_labelled_texts,
    asked=_asked,
    rows=_labelled_rows,
)
SCORED_PAIRS = replace(PAIRS, name="scored pair", texts=_scored_pair_texts, numbers={MARGIN: PreferencePair.margin})
PROMPTS = Kind(
    name="prompt",
    record=Prompt,
    columns=(PROMPT,),
    texts=_prompt_texts,
    asked=_asked,
    rows=_pair_rows,
)
TEXTS = Kind(
    name="text",
    record=PlainText,
    columns=_LEARNED,
    texts=_plain_texts,
    asked=lambda _: ((), ()),
    rows=_plain_rows,
)
"""A text may have any length, because it is cut into rows."""
