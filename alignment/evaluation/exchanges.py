"""Rows of several turns: each turn of the user is asked after the arm's own answer to the turn before.

The format is MT-Bench's (Zheng et al. 2023, section 2.2). Values of an arm are kept by row, then turn, then answer: the
answers to one turn are adjacent, and so are the turns of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedTurn:
    """Turn number ``turn`` (from 0) of the row with the index ``row``."""

    row: int
    turn: int


def asked_turns(rows: Sequence[HeldOutPrompt]) -> list[AskedTurn]:
    """Every turn of every row, in the order in which an arm's values are kept."""
    return [AskedTurn(row=index, turn=turn) for index, row in enumerate(rows) for turn in range(row.num_turns)]


def continued(row: HeldOutPrompt, answers: Sequence[str]) -> HeldOutPrompt:
    """The row as it asks its next turn: its messages, these answers, and the user's turns behind each of them.

    Its reference is the one to that turn.

    Example: ``continued(row, ["4."])`` of a row that asks "2 + 2?" and then "Times 3?" has the messages "2 + 2?", "4."
    and "Times 3?".
    """
    exchanges = zip(answers, row.later_turns[: len(answers)], strict=True)
    turns = [
        Message(role=role, content=content)
        for exchange in exchanges
        for role, content in zip(("assistant", "user"), exchange, strict=True)
    ]
    if not turns:
        return row
    return replace(row, messages=(*row.messages, *turns), reference=row.references[len(answers)])


def prompts_of_answers(rows: Sequence[HeldOutPrompt], texts: Sequence[str], *, per_prompt: int) -> list[HeldOutPrompt]:
    """The prompt of each answer: the conversation before it, with the earlier answers of the same sample.

    ``texts`` are an arm's answers, ``per_prompt`` to each turn.
    """
    asked: list[HeldOutPrompt] = []
    for row, of_row in zip(rows, _of_rows(rows, texts, per_prompt), strict=True):
        for turn in range(row.num_turns):
            earlier = [of_row[sample : turn * per_prompt : per_prompt] for sample in range(per_prompt)]
            asked += [continued(row, answers) for answers in earlier]
    return asked


def _of_rows(rows: Sequence[HeldOutPrompt], texts: Sequence[str], per_prompt: int) -> Iterator[Sequence[str]]:
    start = 0
    for row in rows:
        end = start + row.num_turns * per_prompt
        yield texts[start:end]
        start = end
