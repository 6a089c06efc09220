"""Turns a record of each kind into text segments, then into rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.config.data import Side, TooLong, TooLongConfig
from alignment.core.deadline import watched
from alignment.core.errors import DataError, ModelError
from alignment.data.records import Conversation, LabelledAnswer, PlainText, PreferencePair, Prompt
from alignment.data.tokens.rendering import (
    Segment,
    Tools,
    control_tokens,
    conversation_texts,
    prompt_and_answers,
    prompt_tail,
)
from alignment.data.tokens.thoughts import losses
from alignment.data.tokens.tokenize import Tokens, encode, escaped_text, front, text_rows, tokens_of
from alignment.data.turns import Message


class RowTooLong(DataError):
    """A valid row that is longer than the stage allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Maximum numbers of tokens: of a whole row (with the longer of two answers), of its prompt and of an answer. In a
    conversation the answer is the last turn of the assistant, and the prompt is everything before it."""

    row: int
    prompt: int | None = None
    answer: int | None = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)

    @property
    def cuts(self) -> bool:
        return self.too_long.do is TooLong.cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A row's prompt, and its answers by name. The first ``head`` tokens of the prompt (BOS) and its last ``tail``
    tokens (what the template appends to the last turn's content) are never cut."""

    prompt: Tokens
    answers: Mapping[str, Tokens] = field(default_factory=dict)
    head: int = 0
    tail: int = 0

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(map(len, self.answers.values()), default=0)


def excess(parts: Parts, limits: Limits) -> str:
    """A description of the limits that the row exceeds; empty if it exceeds none."""
    lengths = [("the row", parts.longest, limits.row), ("the prompt", len(parts.prompt), limits.prompt)]
    lengths += [(f"'{name}'", len(tokens), limits.answer) for name, tokens in parts.answers.items()]
    return ", ".join(
        f"{subject} has {length} tokens of {limit}"
        for subject, length, limit in lengths
        if limit is not None and length > limit
    )


def cut_to(parts: Parts, limits: Limits) -> Parts:
    """The parts, cut to their limits. Raises RowTooLong: cutting would leave no prompt, nothing to learn, or two equal
    answers."""
    over = excess(parts, limits)
    answers = {name: tokens[: limits.answer] for name, tokens in parts.answers.items()}
    room = limits.row - max(map(len, answers.values()), default=0)
    room = room if limits.prompt is None else min(room, limits.prompt)
    if room <= parts.head + parts.tail:
        raise RowTooLong(f"{over}; after a cut, nothing would be left of the prompt")
    prompt = _shortened(parts, room, limits.too_long.side)
    if answers and not any(any(part.learned) for part in (prompt, *answers.values())):
        raise RowTooLong(f"{over}; after a cut, nothing would be left to learn")
    ids = [tokens.ids for tokens in answers.values()]
    if len(ids) == 2 and ids[0] == ids[1]:
        raise RowTooLong(f"{over}; after a cut, its two answers would be the same")
    return replace(parts, prompt=prompt, answers=answers)


def _shortened(parts: Parts, room: int, side: Side) -> Tokens:
    prompt = parts.prompt
    if len(prompt) <= room:
        return prompt
    if side is Side.left:
        return prompt[: parts.head] + prompt[len(prompt) - (room - parts.head) :]
    return prompt[: room - parts.tail] + prompt[len(prompt) - parts.tail :]


def refuse_losses(limits: Limits, *, dropped: int, cut: int, records: int, longest: int, where: str) -> None:
    """Accepts a data set of which few enough records were dropped or cut. Raises DataError: too many were, or all were
    dropped. The error gives the length of the longest."""
    share = limits.too_long.max_share
    nothing_left = dropped == records > 0
    if not records or ((dropped + cut) / records <= share and not nothing_left):
        return
    counts = " and ".join(f"{count} {word}" for count, word in ((dropped, "dropped"), (cut, "cut")) if count)
    remedies = ["raise the stage's length limits"]
    remedies += [] if limits.cuts else ["set too_long.do=cut"]
    remedies += [] if nothing_left else ["raise too_long.max_share"]
    raise DataError(
        f"{counts} of {records} rows because they are too long{'' if nothing_left else f', more than {share:.0%}'} "
        f"(the longest has {longest} tokens, the limit is {limits.row})",
        where=where,
        remedy=", or ".join(filter(None, [", ".join(remedies[:-1]), remedies[-1]])),
    )


PROMPT = "prompt"
"""The name of a row's prompt; all other texts are answers."""
DESIRABLE, UNDESIRABLE = "desirable", "undesirable"
"""The names of labelled answers."""
MARGIN = "margin"
"""The column with a pair's difference of scores, which no model takes."""
Texts = dict[str, list[Segment]]
Row = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A sequence of a record, rendered: its ``texts``, and the ``messages`` and ``tools`` of its prompt. ``lost`` names
    what the template leaves out (``thoughts.LOSSES``)."""

    texts: Texts
    messages: Sequence[Message] = ()
    tools: Tools = ()
    lost: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How records of one type become rows. ``sequences`` renders a record, ``rows`` makes rows of token ids with the
    ``columns`` of a sequence's parts. ``numbers`` are further columns, with a number of the record in each. Raises
    DataError: from ``sequences``, if the record cannot be rendered or lacks a number."""

    name: str
    record: type[Any]
    columns: tuple[str, ...]
    sequences: Callable[[Any, Any], list[Rendered]]
    rows: Callable[[Any, Parts, Limits], list[Row]]
    numbers: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)

    @property
    def all_columns(self) -> tuple[str, ...]:
        return (*self.columns, *self.numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """A tokenised record: the ``parts`` of each sequence within the limits and their ``rows``, or the ``fault`` for
    which it has no rows. ``tokens`` is the length of its longest sequence before cutting, and ``cut`` describes what
    was cut. ``lost`` names what the chat template left out (``thoughts.LOSSES``)."""

    record: Any
    rows: Sequence[Row] = ()
    parts: Sequence[Parts] = ()
    fault: DataError | None = None
    tokens: int = 0
    cut: str = ""
    lost: frozenset[str] = frozenset()


def tokenized(tokenizer: Any, kind: Kind, records: Sequence[Any], limits: Limits) -> Iterator[Tokenized]:
    """Yields each record's rows in order. All records are encoded at once, so pass some hundreds, not a million."""
    with watched():
        rendered = [_rendered(tokenizer, kind, record) for record in records]
    sequences = [sequence.texts for of_record in rendered if isinstance(of_record, list) for sequence in of_record]
    every = [segments for sequence in sequences for segments in sequence.values()]
    before = [_before(sequence, name) for sequence in sequences for name in sequence]
    encoded = iter(tokens_of(tokenizer, every, before))
    for record, of_record in zip(records, rendered, strict=True):
        if isinstance(of_record, DataError):
            yield Tokenized(record=record, fault=of_record)
            continue
        whole = [_parts({name: next(encoded) for name in sequence.texts}) for sequence in of_record]
        longest = max(parts.longest for parts in whole)
        try:
            fitted = [
                _fitted(tokenizer, kind, *of_sequence, limits) for of_sequence in zip(of_record, whole, strict=True)
            ]
        except RowTooLong as reason:
            yield Tokenized(record=record, fault=_placed(reason, record.where), tokens=longest)
            continue
        yield Tokenized(
            record=record,
            rows=[row for parts, _ in fitted for row in kind.rows(tokenizer, parts, limits)],
            parts=[parts for parts, _ in fitted],
            tokens=longest,
            cut=next((cut for _, cut in fitted if cut), ""),
            lost=frozenset().union(*(sequence.lost for sequence in of_record)),
        )


def _before(sequence: Texts, name: str) -> str:
    prompt = sequence.get(PROMPT, ()) if name != PROMPT else ()
    return prompt[-1].text if prompt else ""


def _rendered(tokenizer: Any, kind: Kind, record: Any) -> list[Rendered] | DataError:
    try:
        return kind.sequences(tokenizer, record)
    except DataError as fault:
        return _placed(fault, record.where)
    except ModelError as error:
        raise ModelError(error.message, where=record.where, remedy=error.remedy) from error


def _fitted(tokenizer: Any, kind: Kind, sequence: Rendered, whole: Parts, limits: Limits) -> tuple[Parts, str]:
    """The parts within their limits, and a description of what was cut; a text may have any length. Raises RowTooLong:
    the parts are too long, and rows are not cut or this row cannot be."""
    over = "" if kind is TEXTS else excess(whole, limits)
    if not over:
        return whole, ""
    if not limits.cuts:
        raise RowTooLong(over)
    tail = _tail(tokenizer, sequence, whole.prompt.ids)
    if tail is None:
        raise RowTooLong(f"{over}; the end of the last turn in the prompt is unknown, so it cannot be cut")
    begin = front(tokenizer)
    head = len(begin) if tuple(whole.prompt.ids[: len(begin)]) == begin else 0
    return cut_to(replace(whole, head=head, tail=tail), limits), over


def _tail(tokenizer: Any, sequence: Rendered, prompt: list[int]) -> int | None:
    """Number of tokens that the template appends to the content of the prompt's last turn, or None if unknown."""
    text = prompt_tail(tokenizer, sequence.messages, sequence.tools)
    ids = [] if text is None else encode(tokenizer, text)
    return len(ids) if text is not None and prompt[len(prompt) - len(ids) :] == ids else None


def _placed(fault: DataError, where: str) -> DataError:
    return type(fault)(fault.message, where=where, remedy=fault.remedy)


def _parts(named: Mapping[str, Tokens]) -> Parts:
    answers = {name: tokens for name, tokens in named.items() if name != PROMPT}
    return Parts(prompt=named.get(PROMPT, Tokens(ids=[], learned=[])), answers=answers)


# ---- conversations --------------------------------------------------------------------------------------------------


def _conversation(tokenizer: Any, record: Conversation) -> list[Rendered]:
    return [
        Rendered(
            texts={PROMPT: text.segments[:-1], "answer": text.segments[-1:]},
            messages=text.before,
            tools=record.tools,
            lost=_lost(tokenizer, text.context, text.answers, text.text),
        )
        for text in conversation_texts(tokenizer, record.messages, record.tools)
    ]


def _conversation_rows(_: Any, parts: Parts, __: Limits) -> list[Row]:
    prompt, answer = parts.prompt, parts.answers["answer"]
    return [{"input_ids": prompt.ids + answer.ids, "labels": prompt.labels + answer.labels}]


# ---- pairs, labelled answers and prompts ----------------------------------------------------------------------------


def _asked(
    tokenizer: Any, record: PreferencePair | LabelledAnswer | Prompt, answers: Mapping[str, str]
) -> list[Rendered]:
    turns = [Message(role="assistant", content=answer) for answer in answers.values()]
    prompt, *texts = prompt_and_answers(tokenizer, record.messages, turns, record.tools)
    learned = {name: [Segment(text=text, learned=True)] for name, text in zip(answers, texts, strict=True)}
    return [
        Rendered(
            texts={PROMPT: [Segment(text=prompt, learned=False)], **learned},
            messages=record.messages,
            tools=record.tools,
            lost=_lost(tokenizer, record.messages, turns, "".join([prompt, *texts])),
        )
    ]


def _lost(tokenizer: Any, context: Sequence[Message], answers: Sequence[Message], text: str) -> frozenset[str]:
    return losses(context, answers, control_tokens(tokenizer).restored(text))


def _pair(tokenizer: Any, record: PreferencePair) -> list[Rendered]:
    return _asked(tokenizer, record, {"chosen": record.chosen, "rejected": record.rejected})


def _scored_pair(tokenizer: Any, record: PreferencePair) -> list[Rendered]:
    record.margin()  # a pair without one has no sequences
    return _pair(tokenizer, record)


def _ids_by_name(_: Any, parts: Parts, __: Limits) -> list[Row]:
    return [{PROMPT: parts.prompt.ids, **{name: tokens.ids for name, tokens in parts.answers.items()}}]


def _labelled(tokenizer: Any, record: LabelledAnswer) -> list[Rendered]:
    return _asked(tokenizer, record, {DESIRABLE if record.desirable else UNDESIRABLE: record.answer})


def _labelled_rows(tokenizer: Any, parts: Parts, limits: Limits) -> list[Row]:
    empty: Row = {DESIRABLE: [], UNDESIRABLE: []}
    return [empty | row for row in _ids_by_name(tokenizer, parts, limits)]


# ---- texts ----------------------------------------------------------------------------------------------------------


def _plain(tokenizer: Any, record: PlainText) -> list[Rendered]:
    return [Rendered(texts={"text": [Segment(text=escaped_text(tokenizer, record.text), learned=True)]})]


def _plain_rows(tokenizer: Any, parts: Parts, limits: Limits) -> list[Row]:
    rows = text_rows(tokenizer, parts.answers["text"].ids, max_length=limits.row)
    return [{"input_ids": row, "labels": row} for row in rows]


_LEARNED = ("input_ids", "labels")
CONVERSATIONS = Kind(
    name="conversation", record=Conversation, columns=_LEARNED, sequences=_conversation, rows=_conversation_rows
)
PAIRS = Kind(
    name="pair", record=PreferencePair, columns=(PROMPT, "chosen", "rejected"), sequences=_pair, rows=_ids_by_name
)
LABELLED_ANSWERS = Kind(
    name="labelled answer",
    record=LabelledAnswer,
    columns=(PROMPT, DESIRABLE, UNDESIRABLE),
    sequences=_labelled,
    rows=_labelled_rows,
)
SCORED_PAIRS = replace(PAIRS, name="scored pair", sequences=_scored_pair, numbers={MARGIN: PreferencePair.margin})
PROMPTS = Kind(
    name="prompt",
    record=Prompt,
    columns=(PROMPT,),
    sequences=lambda tokenizer, record: _asked(tokenizer, record, {}),
    rows=_ids_by_name,
)
TEXTS = Kind(name="text", record=PlainText, columns=_LEARNED, sequences=_plain, rows=_plain_rows)
"""A text may have any length, because it is cut into rows."""
