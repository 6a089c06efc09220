"""Which of a row's choices a policy finds likeliest, as MMLU asks (Hendrycks et al. 2021).

The choices stand below the question, each behind a letter, and the letters' log-probabilities as the assistant's answer
are compared. Neither the end of the turn nor what the template writes before an answer is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from alignment.core.errors import NonFiniteError
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import prompt_and_choice_ids, tokenize_rows
from alignment.data.turns import Message


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
    """``turns`` gives the prompt of a row as the arm sees it; every row has ``choices`` (the plan checks this).

    Raises:
        DataError: the chat template refuses a row.
    """

    def prompt_and_letters(row: HeldOutPrompt) -> tuple[list[int], list[list[int]]]:
        messages, letters = with_choices(turns(row), row.choices), ascii_uppercase[: len(row.choices)]
        return prompt_and_choice_ids(tokenizer, messages, letters, row.tools)

    tokenized = tokenize_rows(rows, prompt_and_letters)
    return LetterRows(prompts=[prompt for prompt, _ in tokenized], letters=[letters for _, letters in tokenized])


def choice_scores(
    rows: Sequence[HeldOutPrompt], asked: LetterRows, logprobs: Sequence[float], *, name: str
) -> list[float]:
    """1 for each row whose right choice is the likeliest under the policy called ``name``, else 0. If k choices are
    equally likely, each of them has 1 / k of the point, as if one of them was drawn.

    ``logprobs`` are those of ``asked.flat()``.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    if not all(map(math.isfinite, logprobs)):
        raise NonFiniteError(
            f"{name} gives log-probabilities that are not finite",
            remedy="its training went wrong: lower its learning rate, or leave out the arm",
        )
    each = iter(logprobs)
    of_rows = [[next(each) for _ in letters] for letters in asked.letters]
    return [_points(row.right, of_row) for row, of_row in zip(rows, of_rows, strict=True)]


def with_choices(messages: Sequence[Message], choices: Sequence[str]) -> list[Message]:
    """The turns with the choices below the last one's text."""
    *before, question = messages
    listed = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    content = "\n".join([question.content, *listed, "Answer:"])
    return [*before, Message(role=question.role, content=content)]


def _points(right: int | None, logprobs: Sequence[float]) -> float:
    assert right is not None, "a row with choices has a right one"
    highest = max(logprobs)
    return 1.0 / logprobs.count(highest) if logprobs[right] == highest else 0.0
