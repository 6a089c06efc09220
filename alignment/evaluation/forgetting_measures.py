"""Forgetting: how policies do on general text and questions, compared with the base model.

Builds the record ``forgetting.json`` and the rows of ``texts.jsonl`` and ``questions.jsonl`` (docs/design/0015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.data.records import PlainText, Question
from alignment.evaluation.arm_labels import labels
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.general import Measured
from alignment.records.forgetting import ArmForgetting, Forgetting, Limits
from alignment.records.interval import Interval

BASE = "base"
_MOST = 700.0
"""Nats per token; exp of more overflows a float, which a ruined model reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What every arm was measured on: the texts, the number of scored tokens in each, and the questions."""

    texts: Sequence[PlainText]
    tokens: list[int]
    questions: Sequence[Question]


def table(arms: Mapping[str, Measured], asked: Asked, *, limits: Limits, intervals: Intervals) -> Forgetting:
    """All arms, the base model first, and whether all passed. Without limits all pass."""
    label_of = labels(list(arms))
    rows = []
    for name, arm in arms.items():
        row = _before(name, label_of[name], arm, asked)
        rows.append(row if name == BASE else _after(row, arm, arms[BASE], asked, limits, intervals))
    return Forgetting(
        num_texts=len(asked.texts),
        num_tokens=sum(asked.tokens),
        num_questions=len(asked.questions),
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


def text_rows(arms: Mapping[str, Measured], asked: Asked) -> list[dict[str, Any]]:
    """Each text with its number of tokens and its negative log-likelihood under each arm, in nats."""
    return [
        {"id": text.id, "tokens": tokens, "nats": {name: arm.nats[index] for name, arm in arms.items()}}
        for index, (text, tokens) in enumerate(zip(asked.texts, asked.tokens, strict=True))
    ]


def question_rows(arms: Mapping[str, Measured], asked: Asked) -> list[dict[str, Any]]:
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
        for index, question in enumerate(asked.questions)
    ]


def is_right(question: Question, scores: Sequence[float]) -> bool:
    """Whether the right choice alone has the highest score: a policy that scores all choices alike knows nothing."""
    return all(scores[question.right] > score for index, score in enumerate(scores) if index != question.right)


def _before(name: str, label: str, arm: Measured, asked: Asked) -> ArmForgetting:
    """An arm by itself, without a comparison."""
    right = _right(arm, asked.questions)
    nats = sum(arm.nats) / sum(asked.tokens)
    return ArmForgetting(
        name=name,
        label=label,
        nats=nats,
        perplexity=math.exp(min(nats, _MOST)),
        ability=sum(right) / len(right),
        tasks=_by_task(right, asked.questions),
        passed=True,
    )


def _after(
    row: ArmForgetting, arm: Measured, base: Measured, asked: Asked, limits: Limits, intervals: Intervals
) -> ArmForgetting:
    """The arm compared with the base model, and whether it keeps within the limits."""
    right, right_before = (_right(measured, asked.questions) for measured in (arm, base))
    more = [nats - nats_before for nats, nats_before in zip(arm.nats, base.nats, strict=True)]
    rise = intervals.of_ratio(more, asked.tokens).through(_as_rise)
    drop = intervals.of_difference(right_before, right)
    reasons = _reasons(rise, drop, limits)
    return replace(row, rise=rise, drop=drop, passed=not reasons, reasons=reasons)


def _as_rise(nats: float) -> float:
    """Additional nats per token as a relative rise of perplexity."""
    return math.expm1(min(nats, _MOST))


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
    """The share of right answers by task; questions without a task are left out."""
    by_task: dict[str, list[float]] = {}
    for question, value in zip(questions, right, strict=True):
        if question.task:
            by_task.setdefault(question.task, []).append(value)
    return {task: sum(values) / len(values) for task, values in sorted(by_task.items())}
