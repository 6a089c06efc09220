"""Which of a row's choices a policy finds likeliest, as MMLU asks (Hendrycks et al. 2021).

The choices stand below the question, each behind a letter, and the letters' log-probabilities as the assistant's answer
are compared. The end of the turn is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any

from transformers import PreTrainedModel

from alignment.core.errors import NonFiniteError
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.rendering import answer_texts
from alignment.data.tokens.tokenize import encode_all, prompt_ids, tokenize_rows
from alignment.data.turns import Message
from alignment.evaluation.arms import sequence_logprobs


def choice_scores(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[HeldOutPrompt],
    turns: Callable[[HeldOutPrompt], Sequence[Message]],
    *,
    name: str,
) -> list[float]:
    """1 for each row whose right choice alone is the likeliest under the policy called ``name``, else 0.

    ``turns`` gives the prompt of a row as the arm sees it; every row has ``choices`` (the plan checks this).

    Raises:
        DataError: the chat template refuses a row.
        NonFiniteError: a log-probability is not finite.
    """
    letters = tokenize_rows(rows, lambda row: _letters(tokenizer, with_choices(turns(row), row.choices), row.choices))
    prompts = tokenize_rows(rows, lambda row: prompt_ids(tokenizer, with_choices(turns(row), row.choices)))
    repeated = [prompt for prompt, answers in zip(prompts, letters, strict=True) for _ in answers]
    logprobs = iter(sequence_logprobs(model, repeated, [ids for answers in letters for ids in answers]))
    of_rows = [[next(logprobs) for _ in answers] for answers in letters]
    if not all(math.isfinite(logprob) for of_row in of_rows for logprob in of_row):
        raise NonFiniteError(
            f"{name} gives log-probabilities that are not finite",
            remedy="its training went wrong: lower its learning rate, or leave the arm out",
        )
    return [_is_right(row.right, of_row) for row, of_row in zip(rows, of_rows, strict=True)]


def with_choices(messages: Sequence[Message], choices: Sequence[str]) -> list[Message]:
    """The turns with the choices below the last one's text."""
    *before, question = messages
    listed = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    content = "\n".join([question.content, *listed, "Answer:"])
    return [*before, Message(role=question.role, content=content)]


def _letters(tokenizer: Any, messages: Sequence[Message], choices: Sequence[str]) -> list[list[int]]:
    texts = answer_texts(tokenizer, messages, list(ascii_uppercase[: len(choices)]))
    return [ids[:-1] for ids in encode_all(tokenizer, texts)]


def _is_right(right: int | None, logprobs: Sequence[float]) -> float:
    assert right is not None, "a row with choices has a right one"
    return float(all(logprobs[right] > other for index, other in enumerate(logprobs) if index != right))
