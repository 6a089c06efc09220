"""Scores the answers by metrics and graders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from alignment.config.evaluating import GraderConfig
from alignment.config.scoring import MetricConfig
from alignment.core.fingerprint import canonical
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import answer_ids, prompt_ids, tokenize_rows
from alignment.evaluation.arms import TOKENS, Answered, on_the_same_rows, scores_of_prompts
from alignment.evaluation.endpoint import Endpoint, SavedReplies
from alignment.evaluation.exchanges import AskedTurn, asked_turns, prompts_of_answers
from alignment.evaluation.verdicts import rubric_of
from alignment.records.evaluation import Grading
from alignment.rewards.build import build_scorer
from alignment.rewards.reward_models import Computation
from alignment.rewards.rules.similarity import final_number, first_reference
from alignment.rewards.scorer_sources import CHOICE, GRADE, REWARD, is_reference
from alignment.rewards.scorers import Answers, Scorer
from alignment.stages.evaluate.kind import EvaluateConfig, is_graded
from alignment.stages.evaluate.prompts import ArmPrompts
from alignment.stages.shared.answer_sampling import AT_ONCE, asking_of, counted_progress, metric_scores_of, scores_of
from alignment.stages.shared.policy_logprobs import in_shares
from alignment.training.context import StageContext

Source = tuple[str, str]
"""What scores answers: a metric's source, and its settings as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """What all processes compute together: every arm's answers, and what models say of them, by arm. ``answers`` are
    the same as scorers see them. Per answer: log-ratios (nats per sequence), scores of the stage's reward model and of
    other reward ``models``, by source; None for an arm without any. Per prompt: scores of the source ``choice``."""

    rows: Sequence[HeldOutPrompt]
    arms: Mapping[str, Answered]
    answers: Mapping[str, Answers]
    log_ratios: Mapping[str, list[float] | None]
    rewards: Mapping[str, list[float] | None]
    models: Mapping[Source, Mapping[str, list[float]]]
    choices: Mapping[str, list[float]]


def answers_to_score(
    tokenizer: Any, rows: Sequence[HeldOutPrompt], arm_prompts: Mapping[str, ArmPrompts], arms: Mapping[str, Answered]
) -> dict[str, Answers]:
    """Each arm's answers after the plain prompt, as scorers see them; ``tokenizer`` is the run's. The prompt of a later
    turn is the conversation before it, so it has the arm's own answers."""
    first = tokenize_rows(rows, lambda row: prompt_ids(tokenizer, row.messages, row.tools))
    scored = {}
    for name, arm in arms.items():
        turn_of_answer = [turn for turn in asked_turns(rows) for _ in range(arm.per_prompt)]
        texts = [answer.text for answer in arm.answers]
        asked = prompts_of_answers(rows, texts, per_prompt=arm.per_prompt)
        continued = [prompt for prompt, turn in zip(asked, turn_of_answer, strict=True) if turn.turn > 0]
        later = iter(tokenize_rows(continued, lambda prompt: prompt_ids(tokenizer, prompt.messages, prompt.tools)))
        scored[name] = Answers(
            prompt_ids=[next(later) if turn.turn > 0 else first[turn.row] for turn in turn_of_answer],
            answer_ids=_in_our_tokens(tokenizer, asked, arm) if arm_prompts[name].own_tokens else arm.ids,
            texts=texts,
            prompts=asked,
            rows=[turn.row for turn in turn_of_answer],
        )
    return scored


def _in_our_tokens(tokenizer: Any, prompts: Sequence[HeldOutPrompt], arm: Answered) -> list[list[int]]:
    """Answers of a model with another tokenizer, in the run's tokens."""
    rows_of_ids = []
    for row, answer in zip(prompts, arm.answers, strict=True):
        ids = answer_ids(tokenizer, row.messages, answer.text, row.tools)
        rows_of_ids.append(ids if answer.ended or len(ids) == 1 else ids[:-1])
    return rows_of_ids


def scores_by_models(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    rows: Sequence[HeldOutPrompt],
    answers: Mapping[str, Answers],
) -> dict[Source, dict[str, list[float]]]:
    """Every arm's scores by the metrics that are reward models of their own, by source, on every process. The processes
    share the answers, and every process must call this."""
    parts = [part for of_arm in answers.values() for part in of_arm.parts(AT_ONCE)]
    by_source: dict[Source, dict[str, list[float]]] = {}
    for number, metric in enumerate(config.metrics):
        if not is_reference(metric.source) or _source(metric) in by_source:
            continue

        def scores_of_share(share: Sequence[Answers], number: int = number) -> list[float]:
            scorer = _scorer(number, config, context, tokenizer, rows)
            scores: list[float] = []
            for done, part in enumerate(share):
                context.progress(f"scoring by {config.metrics[number].name}", done, len(share))
                scores += scores_of(scorer, part, source=config.metrics[number].source)
            return scores

        scores = iter(in_shares(context, parts, scores_of_share))
        by_source[_source(metric)] = {name: [next(scores) for _ in of_arm.texts] for name, of_arm in answers.items()}
    return by_source


def scores_by_arm(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    computed: Computed,
    grades: Mapping[str, Mapping[str, list[float | None]]],
) -> dict[str, dict[str, list[float | None]]]:
    """Every arm's scores by each metric, one per turn of a prompt. ``grades`` are by metric and arm; a graded metric
    may leave out arms. A metric has None for all turns of a prompt that does not count, because an arm has no
    grade, or the metric's function no score, for one of its answers; without any prompt that counts, no arm has the
    metric."""
    answers = computed.answers
    scores: dict[str, dict[str, list[float | None]]] = {name: {} for name in answers}
    by_source: dict[Source, Mapping[str, Sequence[float | None] | None]] = {
        (REWARD, ""): computed.rewards,
        (CHOICE, ""): {
            name: [score for score in of_arm for _ in range(config.answers.per_prompt)]
            for name, of_arm in computed.choices.items()
        },
        **computed.models,
    }
    by_source |= {_source(metric): grades[metric.name] for metric in config.metrics if metric.source == GRADE}
    sources = {_source(metric) for metric in config.metrics} - set(by_source)
    total = len(sources) * sum(len(of_arm.texts) for of_arm in answers.values())
    progress = counted_progress(context, "scoring by metrics", total)
    for number, metric in enumerate(config.metrics):
        if _source(metric) not in by_source:
            scorer = _scorer(number, config, context, tokenizer, computed.rows)
            given = {
                name: metric_scores_of(scorer, of_arm, source=metric.source, progress=progress)
                for name, of_arm in answers.items()
            }
            by_source[_source(metric)] = on_the_same_rows(given, next(iter(answers.values())).rows)
        for name, of_arm in answers.items():
            if name not in by_source[_source(metric)]:
                continue
            of_answers = by_source[_source(metric)][name]
            assert of_answers is not None, "the plan refuses this metric without a reward model"
            scores[name][metric.name] = scores_of_prompts(
                of_answers,
                [final_number(text) for text in of_arm.texts],
                aggregate=metric.aggregate,
                passing_score=metric.passing_score,
                per_prompt=config.answers.per_prompt,
            )
    return scores


def _scorer(
    number: int, config: EvaluateConfig, context: StageContext, tokenizer: Any, rows: Sequence[HeldOutPrompt]
) -> Scorer:
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    metric, field = config.metrics[number], f"metrics[{number}]"
    return build_scorer(field, metric, context.spec, tokenizer, rows, run, asking_of(context))


def _source(metric: MetricConfig) -> Source:
    """Metrics with the same source share its scores, and differ in how they put several answers together."""
    settings = {
        "pattern": metric.pattern,
        "target": metric.target,
        "schema": metric.schema,
        "server": None if metric.server is None else canonical(metric.server),
        "rubric": metric.rubric,
    }
    used = {name: value for name, value in settings.items() if value is not None}
    return metric.source, json.dumps(used, sort_keys=True) if used else ""


REPLIES = "grades.work.jsonl"
"""Replies of the endpoint while the stage runs, in its work folder."""
LINES = "grades.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grades:
    """What the grader gave. ``by_metric`` has a metric's grades by arm, one per answer; None for all answers to a
    prompt if one of them, in any arm, has no grade. Arms without the metric are missing. ``gradings`` and ``lines`` are
    the parts of ``evaluation.json`` and ``grades.jsonl``."""

    by_metric: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    gradings: list[Grading] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)


def open_grader(config: EvaluateConfig, context: StageContext) -> Endpoint | None:
    """The grader's endpoint, or None if no metric asks it. Call it first, so that errors come early."""
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
    """All grades; ``asked`` are the turns that the answers belong to, ``per_prompt`` answers to each."""
    grades = Grades()
    if grader is None:
        return grades
    for metric in config.metrics:
        if metric.source != GRADE:
            continue
        rubric = rubric_of(config.grader, metric.rubric)
        prompts = [
            rubric.prompt(prompt.messages, text, reference=first_reference(prompt), tools=prompt.tools)
            for of_arm in answers.values()
            for prompt, text in zip(of_arm.prompts, of_arm.texts, strict=True)
        ]
        progress = partial(context.progress, f"grading {metric.name}", total=len(prompts))
        replies = iter(grader.ask(prompts, progress))
        by_arm: dict[str, list[int | None]] = {}
        for name, of_arm in answers.items():
            texts = [next(replies) for _ in of_arm.texts]
            by_arm[name] = [rubric.grade(text) for text in texts]
            grades.lines.extend(_lines(metric.name, name, of_arm, asked, by_arm[name], texts))
        counted, grading = settled(metric.name, by_arm, next(iter(answers.values())).rows, config.grader)
        grades.by_metric[metric.name] = counted
        grades.gradings.append(grading)
    return grades


def settled(
    name: str, by_arm: Mapping[str, Sequence[int | None]], rows: Sequence[int], config: GraderConfig
) -> tuple[dict[str, list[float | None]], Grading]:
    """The grades that count for the metric ``name``, by arm, and a record of those that do not. ``by_arm`` are all
    grades, None for a reply without one; ``rows`` are the rows of the answers. An arm with too many invalid replies is
    left out, and so is every row on which another arm has one."""
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
