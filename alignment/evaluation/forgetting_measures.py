"""What a model forgot: general questions and texts, and the change on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.core.errors import DataError, NonFiniteError
from alignment.data.records import PlainText, Question
from alignment.data.tokens.tokenize import encode, escaped_text, front, prompt_and_choice_ids, tokenize_rows
from alignment.evaluation.paired_scores import labels
from alignment.evaluation.statistics import Intervals
from alignment.records.interval import Interval
from alignment.records.stages import ArmForgetting, Forgetting, Limits

CHUNK_TOKENS = 512
"""Tokens of a text that are read at once; a chunk of a longer text does not see the tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of the text number ``row``: ``scored`` tokens after those that are only ``read``. Example: a text of three
    tokens without BOS gives ``read [5]``, ``scored [6 7]``."""

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
    """Texts and questions, and their tokens, the same for every policy."""

    texts: Sequence[PlainText]
    questions: Sequence[Question]
    chunks: list[Chunk]
    choices: list[list[Choice]]

    @property
    def tokens(self) -> list[int]:
        """The number of scored tokens in each text."""
        counts = [0] * len(self.texts)
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
    """Texts and questions as tokens. Raises DataError: a text has a single token, so there is none to predict; or the
    template refuses a question."""
    rows = tokenize_rows(texts, lambda text: _chunks(tokenizer, text))
    return Material(
        texts=texts,
        questions=questions,
        chunks=[Chunk(row=row, read=read, scored=scored) for row, spans in enumerate(rows) for read, scored in spans],
        choices=tokenize_rows(questions, lambda question: _choices(tokenizer, question)),
    )


def measured(material: Material, chunks: Sequence[float], choices: Sequence[float], *, name: str) -> Measured:
    """What the policy called ``name`` made of all texts and questions. ``chunks`` and ``choices`` are the
    log-probabilities of ``material.chunk_rows`` and ``material.choice_rows``. Raises NonFiniteError: a log-probability
    is not finite."""
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


BASE = "base"
_MOST = 700.0
"""Nats per token; exp of more overflows a float, which a ruined model reaches."""


def table(arms: Mapping[str, Measured], material: Material, *, limits: Limits, intervals: Intervals) -> Forgetting:
    """All arms, the base model first, and whether all passed. Without limits all pass."""
    label_of = labels(list(arms))
    rows = []
    for name, arm in arms.items():
        row = _before(name, label_of[name], arm, material)
        rows.append(row if name == BASE else _after(row, arm, arms[BASE], material, limits, intervals))
    return Forgetting(
        num_texts=len(material.texts),
        num_tokens=sum(material.tokens),
        num_questions=len(material.questions),
        limits=limits,
        judged=limits.judge,
        arms=rows,
        passed=all(row.passed for row in rows),
    )


def headlines(record: Forgetting) -> dict[str, float]:
    """The metrics of the manifest; ``passed`` is 1 or 0, and absent if nothing was judged."""
    metrics = {"passed": float(record.passed)} if record.judged else {}
    for arm in record.arms:
        of_arm = {"perplexity": arm.perplexity, "ability": arm.ability}
        metrics |= {f"{metric}/{arm.label}": value for metric, value in of_arm.items() if value is not None}
    return metrics


def text_rows(arms: Mapping[str, Measured], material: Material) -> list[dict[str, Any]]:
    """Each text with its number of tokens and its negative log-likelihood under each arm, in nats."""
    return [
        {"id": text.id, "tokens": tokens, "nats": {name: arm.nats[index] for name, arm in arms.items()}}
        for index, (text, tokens) in enumerate(zip(material.texts, material.tokens, strict=True))
    ]


def question_rows(arms: Mapping[str, Measured], material: Material) -> list[dict[str, Any]]:
    """Each question with every arm's scores of its choices, in nats per byte, and whether it chose the right one."""
    return [
        {
            "id": question.id,
            "task": question.task,
            "messages": [message.as_dict() for message in question.messages],
            "choices": list(question.choices),
            "answer": question.choices[question.right],
            "scores": {name: arm.scores[index] for name, arm in arms.items()},
            "right": {name: is_right(question, arm.scores[index]) for name, arm in arms.items()},
        }
        for index, question in enumerate(material.questions)
    ]


def is_right(question: Question, scores: Sequence[float]) -> bool:
    """Whether the right choice alone has the highest score: a policy that scores all choices alike knows nothing."""
    return all(scores[question.right] > score for index, score in enumerate(scores) if index != question.right)


def _before(name: str, label: str, arm: Measured, material: Material) -> ArmForgetting:
    right = _right(arm, material.questions)
    nats = sum(arm.nats) / sum(material.tokens)
    return ArmForgetting(
        name=name,
        label=label,
        nats=nats,
        perplexity=math.exp(min(nats, _MOST)),
        ability=sum(right) / len(right),
        tasks=_by_task(right, material.questions),
        passed=True,
    )


def _after(
    row: ArmForgetting, arm: Measured, base: Measured, material: Material, limits: Limits, intervals: Intervals
) -> ArmForgetting:
    right, right_before = (_right(measured, material.questions) for measured in (arm, base))
    more = [nats - nats_before for nats, nats_before in zip(arm.nats, base.nats, strict=True)]
    rise = intervals.of_ratio(more, material.tokens).through(lambda nats: math.expm1(min(nats, _MOST)))
    drop = intervals.of_difference(right_before, right)
    reasons = _reasons(rise, drop, limits)
    return replace(row, rise=rise, drop=drop, passed=not reasons, reasons=reasons)


def _reasons(rise: Interval, drop: Interval, limits: Limits) -> list[str]:
    """Which limits are exceeded, in words; only the mean counts, not its interval."""
    reasons = []
    if limits.perplexity_rise is not None and rise.mean > limits.perplexity_rise:
        reasons.append(
            f"perplexity of general text is {rise.mean:.1%} higher ({rise.low:.1%} to {rise.high:.1%}); "
            f"{limits.perplexity_rise:.1%} is allowed"
        )
    if limits.ability_drop is not None and drop.mean > limits.ability_drop:
        reasons.append(
            f"{drop.mean:.1%} fewer questions are answered right ({drop.low:.1%} to {drop.high:.1%}); "
            f"{limits.ability_drop:.1%} is allowed"
        )
    return reasons


def _right(arm: Measured, questions: Sequence[Question]) -> list[float]:
    return [float(is_right(question, scores)) for question, scores in zip(questions, arm.scores, strict=True)]


def _by_task(right: Sequence[float], questions: Sequence[Question]) -> dict[str, float]:
    by_task: dict[str, list[float]] = {}
    for question, value in zip(questions, right, strict=True):
        by_task.setdefault(question.task, []).append(value)
    return {task: sum(values) / len(values) for task, values in sorted(by_task.items()) if task}
