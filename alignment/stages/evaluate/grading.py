"""Metrics of the source ``grade``: every answer of every arm, graded by a model at an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.config.grader import GraderConfig
from alignment.config.scoring import MetricConfig
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.exchanges import AskedTurn
from alignment.evaluation.grades import rubric_of
from alignment.evaluation.known_scores import on_the_same_rows
from alignment.evaluation.saved_replies import SavedReplies
from alignment.records.evaluation import Grading
from alignment.rewards.rules.similarity import first_reference
from alignment.rewards.scorer_sources import GRADE
from alignment.rewards.scorers import Answers
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.grader_faults import is_graded
from alignment.training.context import StageContext

REPLIES = "grades.work.jsonl"
"""Replies of the endpoint while the stage runs, in its work folder."""
LINES = "grades.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grades:
    """What the grader gave.

    ``by_metric`` has a metric's grades by arm, one per answer; None for all answers to a prompt if one of them, in any
    arm, has no grade. Arms without the metric are missing. ``gradings`` and ``lines`` are the parts of
    ``evaluation.json`` and ``grades.jsonl``.
    """

    by_metric: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    gradings: list[Grading] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)


def open_grader(config: EvaluateConfig, context: StageContext) -> Endpoint | None:
    """The grader's endpoint, or None if no metric asks it. Call it first, so that errors come early.

    Raises:
        ConfigError: its client is not installed, or its key is not set.
    """
    if not is_graded(config):
        return None
    return Endpoint(
        config.grader.endpoint,
        SavedReplies(context.spec.work / REPLIES),
        where=f"stages.{context.spec.stage}.grader",
        without=f"Without metrics of the source '{GRADE}' the evaluation needs no grader",
    )


def grade_answers(
    config: EvaluateConfig,
    context: StageContext,
    grader: Endpoint | None,
    answers: Mapping[str, Answers],
    asked: Sequence[AskedTurn],
) -> Grades:
    """All grades; ``asked`` are the turns that the answers belong to, ``per_prompt`` answers to each.

    Raises:
        StageError: a call to the endpoint fails.
    """
    grades = Grades()
    if grader is None:
        return grades
    for metric in config.metrics:
        if metric.source == GRADE:
            _grade(metric, config.grader, context, grader, answers, asked, grades)
    return grades


def _grade(
    metric: MetricConfig,
    config: GraderConfig,
    context: StageContext,
    grader: Endpoint,
    answers: Mapping[str, Answers],
    asked: Sequence[AskedTurn],
    grades: Grades,
) -> None:
    """Adds a metric's part to ``grades``."""
    rubric = rubric_of(config, metric.rubric)
    prompts = [
        rubric.prompt(prompt.messages, text, reference=first_reference(prompt), tools=prompt.tools)
        for of_arm in answers.values()
        for prompt, text in zip(of_arm.prompts, of_arm.texts, strict=True)
    ]
    replies = iter(grader.ask(prompts, lambda done: context.progress(f"grading {metric.name}", done, len(prompts))))
    by_arm: dict[str, list[int | None]] = {}
    for name, of_arm in answers.items():
        texts = [next(replies) for _ in of_arm.texts]
        by_arm[name] = [rubric.grade(text) for text in texts]
        grades.lines.extend(_lines(metric.name, name, of_arm, asked, by_arm[name], texts))
    counted, grading = settled(metric.name, by_arm, next(iter(answers.values())).rows, config)
    grades.by_metric[metric.name] = counted
    grades.gradings.append(grading)


def settled(
    name: str, by_arm: Mapping[str, Sequence[int | None]], rows: Sequence[int], config: GraderConfig
) -> tuple[dict[str, list[float | None]], Grading]:
    """The grades that count for the metric ``name``, by arm, and a record of those that do not.

    ``by_arm`` are all grades, None for a reply without one; ``rows`` are the rows of the answers. An arm with too many
    invalid replies is left out, and so is every row on which another arm has one.
    """
    invalid = {arm: sum(grade is None for grade in grades) / len(grades) for arm, grades in by_arm.items()}
    fitting = [arm for arm, share in invalid.items() if share <= config.max_invalid]
    grades = {arm: [None if grade is None else float(grade) for grade in by_arm[arm]] for arm in fitting}
    counted = on_the_same_rows(grades, rows)
    without = {
        row for row, grade in zip(rows, next(iter(counted.values()), [None] * len(rows)), strict=True) if grade is None
    }
    grading = Grading(
        metric=name,
        model=config.endpoint.model,
        lowest=config.lowest,
        highest=config.highest,
        num_prompts=len(set(rows) - without),
        invalid=invalid,
        left_out=[arm for arm in by_arm if arm not in counted],
    )
    return counted, grading


def _lines(
    metric: str,
    arm: str,
    answers: Answers,
    asked: Sequence[AskedTurn],
    grades: Sequence[int | None],
    texts: Sequence[str],
) -> list[dict[str, Any]]:
    per_prompt = len(answers.texts) // len(asked)
    lines = []
    for number, (grade, text) in enumerate(zip(grades, texts, strict=True)):
        turn = asked[number // per_prompt]
        answer = {"id": answers.prompts[number].id, "row": turn.row, "turn": turn.turn, "answer": number % per_prompt}
        lines.append({**answer, "arm": arm, "metric": metric, "grade": grade, "text": text})
    return lines
