"""The likelihood of general text under a policy, and which answers to questions it finds likeliest.

A choice is scored as in lm-evaluation-harness for ``acc_bytes``: its log-likelihood as the assistant's answer under the
chat template, divided by its length in bytes, so that short answers have no advantage. Only the choice's own text
counts, and neither the end of the turn nor what the template writes before an answer, such as an empty thought.
The choices are not shown in the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.core.errors import DataError, NonFiniteError
from alignment.data.records import PlainText, Question
from alignment.data.tokens.tokenize import encode, escaped_text, front, prompt_and_choice_ids, tokenize_rows

CHUNK_TOKENS = 512
"""Tokens of a text that are read at once; a chunk of a longer text does not see the tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of the text number ``row``: ``scored`` tokens after those that are only ``read``.

    Example: a text of three tokens without BOS gives ``read [5]``, ``scored [6 7]``.
    """

    row: int
    read: list[int]
    scored: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A choice of a question: the tokens of the prompt and of the answer, and the answer's ``size`` in bytes."""

    prompt: list[int]
    answer: list[int]
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Texts and questions as tokens, the same for every policy."""

    chunks: list[Chunk]
    choices: list[list[Choice]]

    @property
    def tokens(self) -> list[int]:
        """The number of scored tokens in each text."""
        counts = [0] * (1 + max(chunk.row for chunk in self.chunks))
        for chunk in self.chunks:
            counts[chunk.row] += len(chunk.scored)
        return counts

    @property
    def chunk_rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """What is read of each chunk, and what is scored after it."""
        return [chunk.read for chunk in self.chunks], [chunk.scored for chunk in self.chunks]

    @property
    def choice_rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """The prompt and the answer of each choice, question by question."""
        choices = [choice for question in self.choices for choice in question]
        return [choice.prompt for choice in choices], [choice.answer for choice in choices]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One policy's results: ``nats`` of each text, and ``scores`` of each choice of each question, in nats per byte."""

    nats: list[float]
    scores: list[list[float]]


def material(tokenizer: Any, texts: Sequence[PlainText], questions: Sequence[Question]) -> Material:
    """Texts and questions as tokens.

    Raises:
        DataError: a text has a single token, so there is none to predict; or the template refuses a question.
    """
    rows = tokenize_rows(texts, lambda text: _chunks(tokenizer, text))
    return Material(
        chunks=[Chunk(row=row, read=read, scored=scored) for row, spans in enumerate(rows) for read, scored in spans],
        choices=tokenize_rows(questions, lambda question: _choices(tokenizer, question)),
    )


def measured(material: Material, chunks: Sequence[float], choices: Sequence[float], *, name: str) -> Measured:
    """What the policy called ``name`` made of all texts and questions.

    ``chunks`` and ``choices`` are the log-probabilities of ``material.chunk_rows`` and ``material.choice_rows``.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    if not all(map(math.isfinite, [*chunks, *choices])):
        raise NonFiniteError(
            f"{name} gives log-probabilities that are not finite",
            remedy="its training went wrong: lower its learning rate",
        )
    nats = [0.0] * len(material.tokens)
    for chunk, logprob in zip(material.chunks, chunks, strict=True):
        nats[chunk.row] -= logprob
    each = iter(choices)
    scores = [[next(each) / choice.size for choice in question] for question in material.choices]
    return Measured(nats=nats, scores=scores)


def _chunks(tokenizer: Any, text: PlainText) -> list[tuple[list[int], list[int]]]:
    begin = list(front(tokenizer))
    ids = encode(tokenizer, escaped_text(tokenizer, text.text))
    cut = [ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS)]
    spans = [(begin, chunk) if begin else (chunk[:1], chunk[1:]) for chunk in cut]
    if not any(scored for _, scored in spans):
        raise DataError("the text has only one token, so there is nothing to predict", remedy="give longer texts")
    return [(read, scored) for read, scored in spans if scored]


def _choices(tokenizer: Any, question: Question) -> list[Choice]:
    prompt, answers = prompt_and_choice_ids(tokenizer, question.messages, question.choices)
    return [
        Choice(prompt=prompt, answer=answer, size=len(text.encode()))
        for text, answer in zip(question.choices, answers, strict=True)
    ]
