"""Before and after: what policies make of general text and questions, beside what the base model did.

As plain data for ``forgetting.json``, ``texts.jsonl`` and ``questions.jsonl`` (docs/design/0015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignment.data.records import PlainText, Question
from alignment.evaluation.arm_labels import labels
from alignment.evaluation.bootstrap import Interval
from alignment.evaluation.evaluation_record import Intervals
from alignment.evaluation.general import Measured

BASE = "base"
_MOST = 700.0
"""Nats a token beyond which a perplexity is no number any more; a ruined model gets there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that may be lost: of perplexity as a share of the base's, of right answers as a share of questions.

    None is no limit.
    """

    perplexity_rise: float | None
    ability_drop: float | None

    @property
    def judge(self) -> bool:
        """Whether there is any."""
        return self.perplexity_rise is not None or self.ability_drop is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What was read: the texts with the tokens scored in each, and the questions."""

    texts: Sequence[PlainText]
    tokens: list[int]
    questions: Sequence[Question]


def table(arms: Mapping[str, Measured], asked: Asked, *, limits: Limits, intervals: Intervals) -> dict[str, Any]:
    """The content of ``forgetting.json``: all arms, the base model first, and whether every one passed.

    Where nothing was ``judged`` all did.
    """
    called = labels(list(arms))
    rows = [
        {"name": name, "label": called[name], **_row(name, arm, arms[BASE], asked, limits, intervals)}
        for name, arm in arms.items()
    ]
    return {
        "num_texts": len(asked.texts),
        "num_tokens": sum(asked.tokens),
        "num_questions": len(asked.questions),
        "limits": asdict(limits),
        "judged": limits.judge,
        "arms": rows,
        "passed": all(row["passed"] for row in rows),
    }


def headlines(told: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the manifest; ``passed`` is 1 or 0, and left out where nothing was judged."""
    found = {"passed": float(told["passed"])} if told["judged"] else {}
    for row in told["arms"]:
        found |= {f"{figure}/{row['label']}": row[figure] for figure in ("perplexity", "ability")}
    return found


def text_rows(arms: Mapping[str, Measured], asked: Asked) -> list[dict[str, Any]]:
    """Each text with its tokens and what each arm needs for it, in nats."""
    return [
        {"id": text.id, "tokens": tokens, "nats": {name: arm.nats[place] for name, arm in arms.items()}}
        for place, (text, tokens) in enumerate(zip(asked.texts, asked.tokens, strict=True))
    ]


def question_rows(arms: Mapping[str, Measured], asked: Asked) -> list[dict[str, Any]]:
    """Each question with every arm's scores of its choices, in nats a byte, and whether it chose the right one."""
    return [
        {
            "id": question.id,
            "task": question.task,
            "messages": [message.as_dict() for message in question.messages],
            "choices": list(question.choices),
            "answer": question.choices[question.right],
            "scores": {name: arm.scores[place] for name, arm in arms.items()},
            "right": {name: is_right(question, arm.scores[place]) for name, arm in arms.items()},
        }
        for place, question in enumerate(asked.questions)
    ]


def is_right(question: Question, scores: Sequence[float]) -> bool:
    """Whether the right choice has the highest score, alone: who finds all choices alike knows nothing."""
    return all(scores[question.right] > score for place, score in enumerate(scores) if place != question.right)


def _row(
    name: str, arm: Measured, base: Measured, asked: Asked, limits: Limits, intervals: Intervals
) -> dict[str, Any]:
    """One arm; ``rise`` is that of the perplexity as a share of the base's, ``drop`` of the share of right answers."""
    right, before = (_right(one, asked.questions) for one in (arm, base))
    nats = sum(arm.nats) / sum(asked.tokens)
    row = {
        "nats": nats,
        "perplexity": math.exp(min(nats, _MOST)),
        "ability": sum(right) / len(right),
        "tasks": _by_task(right, asked.questions),
        "rise": None,
        "drop": None,
        "passed": True,
        "reasons": [],
    }
    if name == BASE:
        return row
    more = [mine - theirs for mine, theirs in zip(arm.nats, base.nats, strict=True)]
    rise = _grown(intervals.of_ratio(more, asked.tokens))
    drop = intervals.of([theirs - mine for mine, theirs in zip(right, before, strict=True)])
    reasons = _reasons(rise, drop, limits)
    return row | {"rise": asdict(rise), "drop": asdict(drop), "passed": not reasons, "reasons": reasons}


def _grown(nats: Interval) -> Interval:
    """More nats a token as a relative rise of perplexity."""
    mean, low, high = (math.expm1(min(value, _MOST)) for value in (nats.mean, nats.low, nats.high))
    return Interval(mean=mean, low=low, high=high)


def _reasons(rise: Interval, drop: Interval, limits: Limits) -> list[str]:
    """What passes its limit, in words; the figure itself counts, whatever its interval."""
    found = []
    if limits.perplexity_rise is not None and rise.mean > limits.perplexity_rise:
        found.append(
            f"perplexity of general text is {rise.mean:.1%} higher ({rise.low:.1%} to {rise.high:.1%}); "
            f"{limits.perplexity_rise:.1%} is allowed"
        )
    if limits.ability_drop is not None and drop.mean > limits.ability_drop:
        found.append(
            f"{drop.mean:.1%} fewer questions are answered right ({drop.low:.1%} to {drop.high:.1%}); "
            f"{limits.ability_drop:.1%} is allowed"
        )
    return found


def _right(arm: Measured, questions: Sequence[Question]) -> list[float]:
    return [float(is_right(question, scores)) for question, scores in zip(questions, arm.scores, strict=True)]


def _by_task(right: Sequence[float], questions: Sequence[Question]) -> dict[str, float]:
    """The share of right answers to each kind of question that is named."""
    found: dict[str, list[float]] = {}
    for question, one in zip(questions, right, strict=True):
        if question.task:
            found.setdefault(question.task, []).append(one)
    return {task: sum(ones) / len(ones) for task, ones in sorted(found.items())}
