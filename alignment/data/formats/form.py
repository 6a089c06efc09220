"""The type of a format, and functions that several formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.fields import Fields, is_text
from alignment.data.records import Answer, Example
from alignment.data.row_files import TURNS, begins_turns
from alignment.data.turns import Message, tools_of, turn_of, turns_of

PROMPTS = ("messages", "prompt", "conversations", "instruction", "question")
"""Columns that may hold the prompt; the first that is present is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format of rows. ``fits`` checks the columns of a row and their types, but not all of its content. ``read``
    turns the row into an ``Example``, and raises errors for faults in it. ``row`` is an example row, as JSON.
    ``author`` is the column that names the person whose opinion a row is; rows of two people are never duplicates."""

    name: str
    summary: str
    row: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], Example]
    author: str = ""


def holds(row: Mapping[str, Any], *names: str) -> bool:
    """Whether the row has all of these columns, and no null in them."""
    return all(row.get(name) is not None for name in names)


def starts_with_turn(value: Any) -> bool:
    """Whether ``value`` is a list whose first entry looks like a turn."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def is_question(value: Any) -> bool:
    """Whether a column can hold a prompt: text, or turns."""
    return isinstance(value, str) or starts_with_turn(value)


def has_question(row: Mapping[str, Any]) -> bool:
    """Whether a column of the row can hold its prompt."""
    return any(is_question(row.get(name)) for name in PROMPTS)


def asked(fields: Fields, column: str | None = None) -> tuple[tuple[Message, ...], str]:
    """The turns of the prompt, and the name of their column. ``system`` and ``history`` go before them. A format that
    is recognised by its prompt names that ``column``. In other columns such rows may have the whole text of an example,
    with its answer. Raises DataError: no column holds a prompt, or its content is neither text nor turns."""
    field = fields.first_of(*(PROMPTS if column is None else (column,)))
    turns = question_turns(fields, field)
    return with_system(fields, (*_history(fields), *turns) if field == "instruction" else turns), field


def question_turns(fields: Fields, field: str) -> tuple[Message, ...]:
    """The turns of a column that holds a prompt, or its text as a turn of the user: to Alpaca's ``instruction`` its
    ``input`` is appended. Raises DataError: the content is neither text nor turns."""
    value = fields.row[field]
    if isinstance(value, list):
        return turns_of(fields, field)
    if field in TURNS and begins_turns(value):
        fields.fail(field, f"must be a list of turns, or JSON of one, and not its text in Python; it is {value!r:.60}")
    text = fields.text(field)
    more = fields.optional_text("input") if field == "instruction" else ""
    return (Message(role="user", content=f"{text}\n\n{more}" if is_text(more) else text),)


def with_system(fields: Fields, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns after the text of the column ``system``, unless they begin with a system turn. Raises DataError: the
    column holds something else than text."""
    system = fields.optional_text("system")
    if not system.strip() or not turns or turns[0].role == "system":
        return turns
    return (Message(role="system", content=system), *turns)


def example(fields: Fields, column: str | None = None, *, answers: Callable[[], Sequence[Answer]] = tuple) -> Example:
    """A row with a prompt and perhaps ``answers`` to it, which are read after the prompt (``asked``)."""
    turns, field = asked(fields, column)
    return Example(fields=fields, turns=turns, answers=tuple(answers()), tools=tools_of(fields), field=field)


def answer_text(fields: Fields, field: str) -> str:
    """The text of an answer, which may also be an assistant's turn, or a list of one such turn. Raises DataError: the
    field holds something else."""
    value = fields.required(field)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Mapping):
        return fields.text(field)
    turn = turn_of(fields, field, value)
    if turn.role != "assistant" or turn.tool_calls:
        fields.fail(field, f"must be an assistant's text; its role is {turn.role!r}")
    return turn.whole


def preferred(chosen: str, rejected: str) -> tuple[Answer, ...]:
    return (Answer(text=chosen, rank=1.0), Answer(text=rejected, rank=0.0))


def answers_of_whole(
    fields: Fields, chosen: tuple[Message, ...], rejected: tuple[Message, ...], *, names: tuple[str, str]
) -> tuple[tuple[Message, ...], tuple[Answer, ...]]:
    """The common prompt and the two last turns of two whole conversations in the columns ``names``. Raises DataError: a
    conversation does not end with an assistant's text. Raises SetAside: they differ before their last turns, so they
    answer different prompts."""
    for name, turns in zip(names, (chosen, rejected), strict=True):
        if turns[-1].role != "assistant":
            fields.fail(name, f"must end with an assistant turn; the last one's role is {turns[-1].role!r}")
        if turns[-1].tool_calls:
            fields.fail(name, "ends with a tool call, but pairs can only be compared by text")
    if chosen[:-1] != rejected[:-1]:
        reason = f"differs from '{names[0]}' before its last turn, so the two answer different prompts"
        fields.set_aside(names[1], reason)
    return chosen[:-1], preferred(chosen[-1].whole, rejected[-1].whole)


def _history(fields: Fields) -> list[Message]:
    """Alpaca's earlier questions and answers, ``[[question, answer], …]``."""
    value = fields.row.get("history") or []
    turns = []
    for number, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(is_text(text) for text in pair):
            fields.fail(f"history[{number}]", f"must be a question and an answer; it is {pair!r:.60}")
        turns += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return turns
