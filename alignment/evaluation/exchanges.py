"""What a model is asked: turns, examples before them, and choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

import torch

from alignment.core.errors import DataError, NonFiniteError
from alignment.data.overlap import HeldOut, asked
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.tokenize import prompt_and_choice_ids, tokenize_rows
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
    """The row as it asks its next turn: its messages, these answers, and the user's turns behind each of them. Its
    reference is the one to that turn. Example: ``continued(row, ["4."])`` of a row that asks "2 + 2?" and then "Times
    3?" has the messages "2 + 2?", "4." and "Times 3?"."""
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
    """The prompt of each answer: the conversation before it, with the earlier answers of the same sample. ``texts`` are
    an arm's answers, ``per_prompt`` to each turn."""
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


def draw_examples(
    conversations: Sequence[Conversation],
    held_out: Sequence[HeldOutPrompt],
    *,
    count: int,
    generator: torch.Generator,
    where: str,
) -> list[Message]:
    """``2 · count`` turns of as many exchanges: rows of one user turn and its answer, in random order. Rows with a
    system message or several turns are skipped, and so is every row that repeats half of a held-out prompt
    (alignment/data/overlap.py): an example must not give an answer away. Raises DataError: there are fewer such rows
    than ``count``."""
    fitting = [row for row in conversations if [turn.role for turn in row.messages] == ["user", "assistant"]]
    near = {overlap.learned for overlap in HeldOut(map(asked, held_out)).overlaps(map(asked, fitting))}
    free = [row for row in fitting if row.where not in near]
    if len(free) < count:
        raise DataError(
            f"{count} examples are needed, but only {len(free)} of {len(conversations)} rows have one question with "
            f"its answer and repeat no held-out prompt",
            where=where,
            remedy="lower few_shot.count, or give few_shot.data more rows",
        )
    drawn = torch.randperm(len(free), generator=generator)[:count].tolist()
    return [turn for index in drawn for turn in free[index].messages]


def with_examples(messages: Sequence[Message], examples: Sequence[Message]) -> list[Message]:
    """The turns with the examples inserted after the leading system messages."""
    first = next((index for index, turn in enumerate(messages) if turn.role != "system"), len(messages))
    return [*messages[:first], *examples, *messages[first:]]


def with_system_prompt(messages: Sequence[Message], system_prompt: str) -> list[Message]:
    """The turns with the prompt appended to their system message, or as a new one."""
    system = [m.content for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    return [Message(role="system", content="\n".join([*system, system_prompt])), *turns]


@dataclass(frozen=True, kw_only=True, slots=True)
class LetterRows:
    """Token ids of each row's prompt, with the choices below it, and of the letter of each of its choices."""

    prompts: list[list[int]]
    letters: list[list[list[int]]]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row with the longest of its letters."""
        return [
            len(prompt) + max(map(len, letters)) for prompt, letters in zip(self.prompts, self.letters, strict=True)
        ]

    def flat(self) -> tuple[list[list[int]], list[list[int]]]:
        """The prompt and the answer of each choice, row by row."""
        repeated = [prompt for prompt, letters in zip(self.prompts, self.letters, strict=True) for _ in letters]
        return repeated, [ids for letters in self.letters for ids in letters]


def letter_rows(
    tokenizer: Any, rows: Sequence[HeldOutPrompt], turns: Callable[[HeldOutPrompt], Sequence[Message]]
) -> LetterRows:
    """``turns`` gives the prompt of a row as the arm sees it; every row has ``choices`` (the plan checks this). Raises
    DataError: the chat template refuses a row."""

    def prompt_and_letters(row: HeldOutPrompt) -> tuple[list[int], list[list[int]]]:
        messages, letters = with_choices(turns(row), row.choices), ascii_uppercase[: len(row.choices)]
        return prompt_and_choice_ids(tokenizer, messages, letters, row.tools)

    tokenized = tokenize_rows(rows, prompt_and_letters)
    return LetterRows(prompts=[prompt for prompt, _ in tokenized], letters=[letters for _, letters in tokenized])


def choice_scores(
    rows: Sequence[HeldOutPrompt], asked: LetterRows, logprobs: Sequence[float], *, name: str
) -> list[float]:
    """1 for each row whose right choice is the likeliest under the policy called ``name``, else 0. If k choices are
    equally likely, each of them has 1 / k of the point, as if one of them was drawn. ``logprobs`` are those of
    ``asked.flat()``. Raises NonFiniteError: a log-probability is not finite."""
    if not all(map(math.isfinite, logprobs)):
        raise NonFiniteError(
            f"{name} gives log-probabilities that are not finite",
            remedy="its training went wrong: lower its learning rate, or leave out the arm",
        )
    each = iter(logprobs)
    of_rows = [[next(each) for _ in letters] for letters in asked.letters]
    return [_points(row.right, of_row) for row, of_row in zip(rows, of_rows, strict=True)]


def with_choices(messages: Sequence[Message], choices: Sequence[str]) -> list[Message]:
    *before, question = messages
    listed = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    content = "\n".join([question.content, *listed, "Answer:"])
    return [*before, Message(role=question.role, content=content)]


def _points(right: int | None, logprobs: Sequence[float]) -> float:
    assert right is not None, "a row with choices has a right one"
    highest = max(logprobs)
    return 1.0 / logprobs.count(highest) if logprobs[right] == highest else 0.0
