"""Rows of a data file as records that check themselves.

Each record is built by ``from_row(row, where="FILE:LINE")``; a row that does not fit raises a ``DataError`` with the
file and line, the field, and a row of the right form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, Self

from alignment.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn: ``Message(role="user", content="Summarise: …")``."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns to learn from, ending with the assistant's.

    Example row: ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}``
    """

    EXAMPLE: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'
    )

    messages: tuple[Message, ...]
    id: str = ""
    task: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str) -> Self:
        """Raises DataError unless the last turn is the assistant's."""
        fields = _Fields(row, where=where, example=cls.EXAMPLE)
        messages = fields.messages()
        if messages[-1].role != "assistant":
            fields.fail("messages", f"must end with an assistant turn; the last one's role is {messages[-1].role!r}")
        return cls(messages=messages, id=fields.label("id"), task=fields.label("task"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the better one first. ``flaw`` says in a word what is wrong with ``rejected``.

    Example row: ``{"messages": [{"role": "user", "content": "2 + 2?"}], "chosen": "4.", "rejected": "5."}``
    """

    EXAMPLE: ClassVar[str] = '{"messages": [{"role": "user", "content": "2 + 2?"}], "chosen": "4.", "rejected": "5."}'

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    id: str = ""
    task: str = ""
    flaw: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str) -> Self:
        """Raises DataError unless both answers are there and differ."""
        fields = _Fields(row, where=where, example=cls.EXAMPLE)
        pair = cls(
            messages=fields.prompt(),
            chosen=fields.text("chosen"),
            rejected=fields.text("rejected"),
            id=fields.label("id"),
            task=fields.label("task"),
            flaw=fields.label("flaw"),
        )
        if pair.chosen.strip() == pair.rejected.strip():
            fields.fail("rejected", "is the same as 'chosen'; there is nothing to prefer")
        return pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Turns that an answer is sampled for; a trailing assistant turn in the row is dropped.

    ``row`` is the whole row and ``where`` its ``FILE:LINE``, for scorers that look at more than the prompt.

    Example row: ``{"messages": [{"role": "user", "content": "Summarise: …"}]}``
    """

    EXAMPLE: ClassVar[str] = '{"messages": [{"role": "user", "content": "Summarise: the shop is closed on Monday."}]}'

    messages: tuple[Message, ...]
    id: str = ""
    task: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    where: str = field(default="", compare=False)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str) -> Self:
        """Raises DataError unless a user turn is left at the end."""
        fields = _Fields(row, where=where, example=cls.EXAMPLE)
        return cls(
            messages=fields.prompt(drop_answer=True),
            id=fields.label("id"),
            task=fields.label("task"),
            row=row,
            where=where,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutPrompt:
    """A prompt with the facts that a good answer carries; each fact is a list of wordings, any of which counts.

    Example row: ``{"messages": [{"role": "user", "content": "When …?"}], "facts": [["21 March", "March 21"]]}``
    """

    EXAMPLE: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "When is the training?"}], "facts": [["21 March", "March 21"]]}'
    )

    messages: tuple[Message, ...]
    facts: tuple[tuple[str, ...], ...]
    reference: str = ""
    id: str = ""
    task: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, where: str) -> Self:
        """Raises DataError unless there is a prompt and at least one fact."""
        fields = _Fields(row, where=where, example=cls.EXAMPLE)
        return cls(
            messages=fields.prompt(),
            facts=fields.facts(),
            reference=fields.label("reference"),
            id=fields.label("id"),
            task=fields.label("task"),
        )


def facts_in(prompt: Prompt) -> tuple[tuple[str, ...], ...] | None:
    """The key facts that the row of a prompt lists, or None where it lists none.

    Raises:
        DataError: its field ``facts`` is of another form.
    """
    if prompt.row.get("facts") is None:
        return None
    return _Fields(prompt.row, where=prompt.where, example=HeldOutPrompt.EXAMPLE).facts()


class _Fields:
    """Reads the fields of one row; every fault names the row, the field and the right form."""

    def __init__(self, row: Any, *, where: str, example: str) -> None:
        self._where = where
        self._example = example
        if not isinstance(row, Mapping):
            raise DataError(f"a row must be a JSON object; {row!r:.60} is none", where=where, remedy=self._remedy())
        self._row = row

    def fail(self, field: str, problem: str) -> NoReturn:
        raise DataError(f"'{field}' {problem}", where=self._where, remedy=self._remedy())

    def text(self, field: str) -> str:
        """Text that must be there."""
        value = self._required(field)
        if not isinstance(value, str) or not value.strip():
            self.fail(field, f"must be text and not empty; it is {value!r:.60}")
        return str(value)

    def label(self, field: str) -> str:
        """Text that may be absent or null, then empty."""
        value = self._row.get(field)
        if value is not None and not isinstance(value, (str, int)):
            self.fail(field, f"must be text; it is {value!r:.60}")
        return "" if value is None else str(value)

    def messages(self) -> tuple[Message, ...]:
        """The turns, with known roles; a system turn may only come first."""
        value = self._required("messages")
        if not isinstance(value, list) or not value:
            self.fail("messages", f"must be a list of turns and not empty; it is {value!r:.60}")
        turns = tuple(self._message(number, turn) for number, turn in enumerate(value))
        for number, turn in enumerate(turns):
            if turn.role == "system" and number > 0:
                self.fail(f"messages[{number}].role", "is 'system'; only the first turn may be")
        return turns

    def prompt(self, *, drop_answer: bool = False) -> tuple[Message, ...]:
        """The turns up to a user's, which must be the last once a trailing answer is dropped."""
        turns = self.messages()
        if drop_answer and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1].role != "user":
            last = repr(turns[-1].role) if turns else "missing"
            self.fail("messages", f"must end with a user turn; the last one's role is {last}")
        return turns

    def facts(self) -> tuple[tuple[str, ...], ...]:
        """Key facts, at least one, each with at least one wording."""
        value = self._required("facts")
        if not isinstance(value, list) or not value:
            self.fail("facts", f"must be a list of facts and not empty; it is {value!r:.60}")
        for number, wordings in enumerate(value):
            if not isinstance(wordings, list) or not wordings or not all(_is_text(item) for item in wordings):
                self.fail(f"facts[{number}]", f"must be a list of wordings; it is {wordings!r:.60}")
        return tuple(tuple(wordings) for wordings in value)

    def _message(self, number: int, turn: Any) -> Message:
        at = f"messages[{number}]"
        if not isinstance(turn, Mapping):
            self.fail(at, f"must be an object with 'role' and 'content'; it is {turn!r:.60}")
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            self.fail(f"{at}.role", f"must be one of {', '.join(ROLES)}; it is {role!r:.60}")
        if not _is_text(content):
            self.fail(f"{at}.content", f"must be text and not empty; it is {content!r:.60}")
        return Message(role=str(role), content=str(content))

    def _required(self, field: str) -> Any:
        if field not in self._row:
            self.fail(field, f"is missing; the row has {_listed(list(self._row))}")
        return self._row[field]

    def _remedy(self) -> str:
        return f"a row of the right form: {self._example}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) if names else "no fields"
