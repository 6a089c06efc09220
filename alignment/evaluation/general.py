"""What a policy makes of general text, and which answers to questions it finds likeliest.

A choice is scored as lm-evaluation-harness scores one for ``acc_norm``: by its log-likelihood as the assistant's answer
under the chat template, the end of the turn left out, divided by its length in bytes, so that short answers are not
ahead because they are short. The choices are not shown in the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from alignment.core.errors import DataError, NonFiniteError
from alignment.data.records import PlainText, Question
from alignment.data.tokens.rendering import answer_texts
from alignment.data.tokens.tokenize import encode, encode_all, escaped_text, front, prompt_ids, tokenize_rows
from alignment.evaluation.arms import sequence_logprobs

PIECE = 512
"""Tokens of a text that are read at once; what stands before them in a longer text is not seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of the text number ``row``: ``scored`` tokens behind those that are only read.

    Example: a text of three tokens without BOS gives ``read [5]``, ``scored [6 7]``.
    """

    row: int
    read: list[int]
    scored: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An answer to choose: the prompt's tokens, its own, and the bytes of its text."""

    prompt: list[int]
    answer: list[int]
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Texts and questions as tokens, the same for every policy."""

    pieces: list[Piece]
    choices: list[list[Choice]]

    @property
    def tokens(self) -> list[int]:
        """How many tokens are scored in each text."""
        counts = [0] * (1 + max(piece.row for piece in self.pieces))
        for piece in self.pieces:
            counts[piece.row] += len(piece.scored)
        return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one policy says: nats of each text, and of each question the score of each choice, in nats a byte."""

    nats: list[float]
    scores: list[list[float]]


def material(tokenizer: Any, texts: Sequence[PlainText], questions: Sequence[Question]) -> Material:
    """Texts and questions as tokens.

    Raises:
        DataError: a text has a single token, so that nothing in it can be foretold; or the template refuses a question.
    """
    rows = tokenize_rows(texts, lambda text: _pieces(tokenizer, text))
    return Material(
        pieces=[Piece(row=row, read=read, scored=scored) for row, found in enumerate(rows) for read, scored in found],
        choices=tokenize_rows(questions, lambda question: _choices(tokenizer, question)),
    )


def measure(model: PreTrainedModel, told: Material, *, name: str) -> Measured:
    """What the policy called ``name`` says of everything.

    Raises:
        NonFiniteError: a log-probability is not finite.
        ModelError: the model's head does more than one matrix product.
    """
    choices = [choice for question in told.choices for choice in question]
    texts = sequence_logprobs(model, [piece.read for piece in told.pieces], [piece.scored for piece in told.pieces])
    answers = sequence_logprobs(model, [one.prompt for one in choices], [one.answer for one in choices])
    if not all(map(math.isfinite, [*texts, *answers])):
        raise NonFiniteError(
            f"{name} gives log-probabilities that are not finite", remedy="its training went wrong: lower its rate"
        )
    nats = [0.0] * len(told.tokens)
    for piece, logprob in zip(told.pieces, texts, strict=True):
        nats[piece.row] -= logprob
    scores = iter([logprob / choice.size for choice, logprob in zip(choices, answers, strict=True)])
    return Measured(nats=nats, scores=[[next(scores) for _ in question] for question in told.choices])


def _pieces(tokenizer: Any, text: PlainText) -> list[tuple[list[int], list[int]]]:
    begin = list(front(tokenizer))
    ids = encode(tokenizer, escaped_text(tokenizer, text.text))
    cut = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
    found = [(begin, piece) if begin else (piece[:1], piece[1:]) for piece in cut]
    if not any(scored for _, scored in found):
        raise DataError("a text of a single token, in which nothing can be foretold", remedy="give longer texts")
    return [(read, scored) for read, scored in found if scored]


def _choices(tokenizer: Any, question: Question) -> list[Choice]:
    prompt = prompt_ids(tokenizer, question.messages)
    answers = encode_all(tokenizer, answer_texts(tokenizer, question.messages, question.choices))
    return [
        Choice(prompt=prompt, answer=answer[:-1], size=len(text.encode()))
        for text, answer in zip(question.choices, answers, strict=True)
    ]
