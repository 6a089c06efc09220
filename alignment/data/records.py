"""Rows as validated records, whatever their format. ``alignment/data/formats`` turns a row of any public format into an
``Example``, from which a record is built. A row that does not fit raises a ``DataError`` with file and line, the field,
and a row of the right form. ``where`` is a record's ``FILE:LINE``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar, Protocol, Self

from alignment.core.errors import DataError
from alignment.data.fields import Fields, is_text, not_finite
from alignment.data.turns import Message

SCORE_COLUMNS = ("chosen_score", "rejected_score")
"""Columns with the scores of a pair's answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer to the last user turn; of two, the one with the higher ``rank`` is better. ``score`` is a number that
    the row gives it on any scale."""

    text: str
    rank: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """The content of a row, whatever its columns are called. ``turns`` may end with the assistant's turn; otherwise
    ``answers`` may hold answers to the last turn. ``good`` is a label's verdict on the last turn. ``later_turns`` are
    the user's next turns, each asked after an answer to the one before. ``field`` names the column for errors about
    turns."""

    fields: Fields
    turns: tuple[Message, ...] = ()
    later_turns: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()
    good: bool | None = None
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    field: str = "messages"

    def prompt(self, *, drop_answer: bool = False) -> tuple[Message, ...]:
        """The turns, without a last answer if ``drop_answer``. They must end with a turn of the user or of a tool."""
        self.refuse_text()
        turns = self.turns
        if drop_answer and turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1].role not in ("user", "tool"):
            last = repr(turns[-1].role) if turns else "missing"
            self.fields.fail(self.field, f"must end with a user turn; the last one's role is {last}")
        return turns

    def compared(self) -> tuple[Answer, ...]:
        """The answers. Raises DataError if there are several and a score or rank is not finite."""
        for number, answer in enumerate(self.answers if len(self.answers) > 1 else ()):
            if not math.isfinite(answer.rank):
                self.fields.fail(f"completions[{number}]", "has a score or rank that is not a finite number")
        return self.answers

    def refuse_bad(self) -> None:
        """Raises SetAside if a label says that the answer is bad."""
        if self.good is False:
            self.fields.set_aside("label", "says that the answer is bad")

    def refuse_text(self) -> None:
        """Raises DataError if the row is plain text."""
        if self.text:
            self.fields.fail(self.field, "is plain text, without a prompt or an answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns to learn from, ending with the assistant's. The best of several answers is learned. Labelled answers are
    learned if they are good."""

    EXAMPLE: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'
    )

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    task: str = ""
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Raises DataError unless the last turn is the assistant's; SetAside if it is labelled as bad."""
        example.refuse_text()
        fields, messages = example.fields, example.turns
        example.refuse_bad()
        if example.answers:
            best = max(example.compared(), key=lambda answer: answer.rank)
            messages = (*example.prompt(), Message(role="assistant", content=best.text))
        if not messages or messages[-1].role != "assistant":
            last = repr(messages[-1].role) if messages else "missing"
            fields.fail(example.field, f"must end with an assistant turn; the last one's role is {last}")
        yield cls(messages=messages, **_common(example))


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the better one first. ``flaw`` says in a word what is wrong with ``rejected``,
    ``subset`` to which part of a benchmark the pair belongs. ``scores`` are those of the chosen and of the rejected
    answer, if the row has both. ``row`` is the whole row, for a rule that looks at more."""

    EXAMPLE: ClassVar[str] = '{"messages": [{"role": "user", "content": "2 + 2?"}], "chosen": "4.", "rejected": "5."}'

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    task: str = ""
    flaw: str = ""
    subset: str = ""
    scores: tuple[float, float] | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Yields all pairs of answers of different rank. Raises DataError if answers are missing or equal."""
        fields = example.fields
        if not example.answers:
            fields.fail_as_missing("chosen", why="the row does not have two answers to compare")
        shared = _common(example) | {name: fields.label(name) for name in ("flaw", "subset")}
        num_pairs = 0
        for first, second in combinations(example.compared(), 2):
            better, worse = (first, second) if first.rank > second.rank else (second, first)
            if better.rank == worse.rank:
                continue
            if better.text.strip() == worse.text.strip():
                fields.fail("rejected", "is the same as 'chosen', so there is no preference")
            num_pairs += 1
            yield cls(
                messages=example.prompt(),
                chosen=better.text,
                rejected=worse.text,
                scores=_scores(fields, better, worse),
                row=fields.row,
                **shared,
            )
        if not num_pairs:
            fields.set_aside("answers", "all have the same rank")

    def margin(self) -> float:
        """By how much the chosen answer scores higher. Raises DataError: the row has no scores, or they contradict the
        preference."""
        if (column := next((name for name in SCORE_COLUMNS if not_finite(self.row.get(name))), None)) is not None:
            raise DataError(
                f"'{column}' must be a finite number, because 'margin' learns from it; it is {self.row[column]}",
                where=self.where,
                remedy="correct it, remove the row, or set margin=0",
            )
        if self.scores is None:
            raise DataError(
                f"the row has no numbers in {' and '.join(map(repr, SCORE_COLUMNS))}, which 'margin' learns from",
                where=self.where,
                remedy=f"add them, map your columns (data.columns={{{SCORE_COLUMNS[0]}: YOURS}}), or set margin=0",
            )
        chosen, rejected = self.scores
        if chosen < rejected:
            raise DataError(
                f"the chosen answer scores {chosen:g}, less than the rejected one with {rejected:g}",
                where=self.where,
                remedy="swap the answers or remove the row; the scores must agree with the preference",
            )
        return chosen - rejected


def _common(example: Example) -> dict[str, Any]:
    fields = example.fields
    return {"tools": example.tools, "id": fields.label("id"), "task": fields.label("task"), "where": fields.where}


def _scores(fields: Fields, better: Answer, worse: Answer) -> tuple[float, float] | None:
    chosen, rejected = better.score, worse.score
    if chosen is None or rejected is None:
        chosen, rejected = (fields.number(name) for name in SCORE_COLUMNS)
    if chosen is None or rejected is None or not math.isfinite(chosen - rejected):
        return None
    return float(chosen), float(rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledAnswer:
    """An answer to a prompt, and whether it is ``desirable``. Of a pair, the better answer is desirable and the worse
    one is not."""

    EXAMPLE: ClassVar[str] = '{"messages": [{"role": "user", "content": "2 + 2?"}], "completion": "4.", "label": true}'

    messages: tuple[Message, ...]
    answer: str
    desirable: bool
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    task: str = ""
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Yields the labelled answer, or both answers of a pair. Raises DataError if neither is there; SetAside for a
        pair of equal rank."""
        example.refuse_text()
        messages, shared = example.prompt(drop_answer=True), _common(example)
        for answer, desirable in _labelled_answers(example):
            yield cls(messages=messages, answer=answer, desirable=desirable, **shared)


def _labelled_answers(example: Example) -> list[tuple[str, bool]]:
    fields, answers = example.fields, example.compared()
    if example.good is not None:
        last = example.turns[-1] if example.turns else None
        if last is None or last.role != "assistant" or not last.content.strip():
            fields.fail_as_missing("completion", why="the row has a label, but no answer that it applies to")
        if last.tool_calls:
            fields.fail(example.field, "ends with a tool call, but labelled answers are learned as text")
        return [(last.whole, example.good)]
    if len(answers) != 2:
        if fields.has("label"):
            way_out = "" if answers else "; if it says whether the answer is good, read the rows with format=kto"
            fields.fail("label", f"is not read in this format{way_out}")
        has = f"{len(answers)} answers of different rank" if answers else "no label"
        fields.fail_as_missing("label", why=f"the row has {has}, so nothing says whether an answer is desirable")
    better, worse = sorted(answers, key=lambda answer: -answer.rank)
    if better.rank == worse.rank:
        fields.set_aside("answers", "all have the same rank")
    if better.text.strip() == worse.text.strip():
        fields.fail("rejected", "is the same as 'chosen', so it would be both desirable and undesirable")
    return [(better.text, True), (worse.text, False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Turns to sample an answer for; a trailing assistant turn in the row is dropped. ``row`` is the whole row, for
    scorers that read more than the prompt."""

    EXAMPLE: ClassVar[str] = '{"messages": [{"role": "user", "content": "Summarise: the shop is closed on Monday."}]}'

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    task: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Raises DataError unless the remaining turns end with a user's or a tool's."""
        yield cls(messages=example.prompt(drop_answer=True), row=example.fields.row, **_common(example))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutPrompt(Prompt):
    """A prompt that arms of an evaluation answer, and a ``reference`` answer where the row has one: its column of that
    name, or a trailing assistant turn that no label calls bad. A row with answers to choose from has ``choices``, of
    which ``right`` is the index of the best one. ``later_turns`` are what the user says next, each after the arm's
    answer to the turn before; ``later_references`` are the reference answers to them, "" for a turn without one."""

    EXAMPLE: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "When is the training?"}], "reference": "On 21 March."}'
    )

    reference: str = ""
    choices: tuple[str, ...] = ()
    right: int | None = None
    later_turns: tuple[str, ...] = ()
    later_references: tuple[str, ...] = ()

    @property
    def num_turns(self) -> int:
        return 1 + len(self.later_turns)

    @property
    def references(self) -> tuple[str, ...]:
        """The reference answer to each turn, "" for a turn without one."""
        return (self.reference, *(self.later_references or ("",) * len(self.later_turns)))

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Raises DataError unless a user turn is left at the end, and references fit the turns."""
        fields = example.fields
        ranks = [answer.rank for answer in example.answers]
        # Other rows with several answers have the better one first, so the letter alone would give it away.
        has_choices = isinstance(fields.row.get("choices"), list) and len(ranks) > 1 and ranks.count(max(ranks)) == 1
        messages = example.prompt(drop_answer=True)
        reference, *later_references = _references(example)
        yield cls(
            messages=messages,
            row=fields.row,
            **_common(example),
            reference=reference or _last_answer(example, messages),
            choices=tuple(answer.text for answer in example.answers) if has_choices else (),
            right=ranks.index(max(ranks)) if has_choices else None,
            later_turns=example.later_turns,
            later_references=tuple(later_references),
        )


def _last_answer(example: Example, messages: Sequence[Message]) -> str:
    """The answer that ends the turns, behind ``messages``, with its thought; empty without one, for a call alone, and
    for one that is labelled as bad."""
    if example.good is False:
        return ""
    return "".join(turn.whole for turn in example.turns[len(messages) :] if turn.content.strip())


def _references(example: Example) -> list[str]:
    fields, num_turns = example.fields, 1 + len(example.later_turns)
    value = fields.row.get("reference")
    if example.field != "turns" or not isinstance(value, list):
        return [fields.answer("reference"), *[""] * (num_turns - 1)]
    if value and len(value) != num_turns:
        fields.fail("reference", f"must have an entry for each of the {num_turns} turns; it has {len(value)}")
    for number, text in enumerate(value):
        if text is not None and not isinstance(text, str):
            fields.fail(f"reference[{number}]", f"must be text; it is {text!r:.60}")
    return [text or "" for text in value] or [""] * num_turns


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Turns that end with a question, and answers to choose from; ``right`` is the index of the right one."""

    EXAMPLE: ClassVar[str] = '{"question": "2 + 2?", "choices": ["3", "4"], "answer": "4"}'

    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int
    id: str = ""
    task: str = ""
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Raises DataError unless there are at least two answers, all different, and a single best one."""
        fields, messages = example.fields, example.prompt()
        texts = [answer.text.strip() for answer in example.answers]
        if len(texts) == 1:
            fields.fail("choices", "has fewer than two answers to choose from")
        if not texts:
            fields.fail_as_missing("choices", why="the row does not have two answers to choose from")
        if repeated := next((text for index, text in enumerate(texts) if text in texts[:index]), None):
            fields.fail("choices", f"contains {repeated!r:.60} twice; all must be different")
        ranks = [answer.rank for answer in example.compared()]
        if ranks.count(max(ranks)) > 1:
            fields.fail("choices", "has several best answers; it must have exactly one")
        yield cls(
            messages=messages,
            choices=tuple(texts),
            right=ranks.index(max(ranks)),
            id=fields.label("id"),
            task=fields.label("task"),
            where=fields.where,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainText:
    """Text to learn as it is. The text of a conversation is that of its turns and of its best answer; labelled answers
    are learned if they are good. A row with a prompt, no answer and a column ``text`` gives that text."""

    EXAMPLE: ClassVar[str] = '{"text": "The shop is closed on Monday."}'

    text: str
    id: str = ""
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, example: Example) -> Iterator[Self]:
        """Raises DataError if the text is empty; SetAside if it ends with an answer that is labelled as bad."""
        example.refuse_bad()
        best = sorted(example.compared(), key=lambda answer: -answer.rank)[:1]
        turns = [*(turn.whole for turn in example.turns), *(answer.text for answer in best)]
        text = example.text or _text_beside_prompt(example) or "\n\n".join(filter(None, turns))
        if not text:
            example.fields.fail(example.field, "is empty")
        yield cls(text=text, id=example.fields.label("id"), where=example.fields.where)


def _text_beside_prompt(example: Example) -> str:
    """The column ``text`` of a row that has only a prompt besides, such as the prompt that the text was written for;
    empty for all other rows."""
    text = example.fields.row.get("text")
    has_answer = bool(example.answers) or (bool(example.turns) and example.turns[-1].role == "assistant")
    return str(text) if is_text(text) and not has_answer else ""


Record = PlainText | Conversation | PreferencePair | LabelledAnswer | Prompt | HeldOutPrompt | Question


class HasRow(Protocol):
    """A record that carries its whole row, for scorers that look at more than its own fields."""

    @property
    def row(self) -> Mapping[str, Any]: ...

    @property
    def where(self) -> str: ...
