"""Has the configured judge judge pairs of answers of which people have chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.config.evaluating import JudgeKind
from alignment.config.scoring import MetricConfig
from alignment.core.wording import divided
from alignment.data.mix import some
from alignment.data.records import HeldOutPrompt, PreferencePair
from alignment.data.tokens.tokenize import answer_ids, prompt_ids, tokenize_rows
from alignment.evaluation.arms import TOKENS
from alignment.evaluation.conclusions import CHOSEN, REJECTED, one_of_each_prompt
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.statistics import Intervals
from alignment.evaluation.tables import judged_pair
from alignment.evaluation.verdicts import BothOrders, judge_prompt, points_of, rubric_of
from alignment.records.evaluation import JudgedPair
from alignment.rewards.build import build_scorer
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorer_sources import GRADE, REWARD
from alignment.rewards.scorers import Answers
from alignment.stages.evaluate.judging import in_both_orders
from alignment.stages.evaluate.kind import LABELLED, EvaluateConfig, labels_pairs, primary_metric
from alignment.stages.shared.answer_sampling import asking_of, counted_progress, metric_scores_of
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext

LINES = "labelled_judgements.jsonl"
_PHASE = "judging labelled pairs"


def judge_labelled(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    endpoint: Endpoint | None,
    grader: Endpoint | None,
    intervals: Intervals,
) -> tuple[JudgedPair | None, list[dict[str, Any]]]:
    """The judge's verdicts on at most ``max_prompts`` pairs: its row, in which the chosen answer is the arm, and the
    lines; empty if there are none to judge."""
    if not labels_pairs(config.judge):
        return None, []
    settings = config.judge.labelled
    every = one_of_each_prompt(rows_of(context, PreferencePair, settings.data, field=LABELLED))
    pairs = [every[index] for index in some(len(every), settings.max_prompts, context.generator("judge.labelled"))]
    both = None
    if endpoint is not None:
        both, lines = _by_endpoint(config, context, endpoint, pairs)
        points = [orders.points for orders in both]
    else:
        scores = _scores(config, context, tokenizer, grader, pairs)
        points, lines = _by_scores(config, pairs, scores)
    judged = judged_pair(
        CHOSEN,
        REJECTED,
        points,
        both,
        extra_words=[float(len(divided(pair.chosen)) - len(divided(pair.rejected))) for pair in pairs],
        by_metric=None,
        max_invalid=config.judge.max_invalid,
        intervals=intervals,
    )
    return judged, lines


def _by_endpoint(
    config: EvaluateConfig, context: StageContext, endpoint: Endpoint, pairs: Sequence[PreferencePair]
) -> tuple[list[BothOrders], list[dict[str, Any]]]:
    criteria = config.judge.endpoint.criteria
    prompts = [
        judge_prompt(pair.messages, *answers, criteria=criteria, tools=pair.tools)
        for pair in pairs
        for answers in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen))
    ]
    both, replies = in_both_orders(endpoint, context, prompts, [CHOSEN, REJECTED] * len(pairs), phase=_PHASE)
    return both, [_line(pairs[number // 2]) | reply for number, reply in enumerate(replies)]


def _by_scores(
    config: EvaluateConfig, pairs: Sequence[PreferencePair], scores: Sequence[float | None]
) -> tuple[list[float | None], list[dict[str, Any]]]:
    """Compares two scores; ``scores`` are those of the chosen and the rejected answer of each pair in turn."""
    metric = primary_metric(config)
    fewer_is_better = config.judge.kind is JudgeKind.metric and metric is not None and not metric.higher_is_better
    points, lines = [], []
    for pair, chosen, rejected in zip(pairs, scores[::2], scores[1::2], strict=True):
        point = points_of(rejected, chosen) if fewer_is_better else points_of(chosen, rejected)
        points.append(point)
        lines.append(_line(pair) | {"chosen_score": chosen, "rejected_score": rejected, "points": point})
    return points, lines


def _scores(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    grader: Endpoint | None,
    pairs: Sequence[PreferencePair],
) -> list[float | None]:
    """The judge's score of each chosen and rejected answer in turn; None for one without a score."""
    metric = primary_metric(config) if config.judge.kind is JudgeKind.metric else MetricConfig(source=REWARD)
    assert metric is not None, "the plan refuses to judge by a metric where there is none"
    answers = _answers(tokenizer, pairs)
    if metric.source == GRADE:
        assert grader is not None, "a metric of this source opens the grader"
        rubric = rubric_of(config.grader, metric.rubric)
        prompts = [
            rubric.prompt(prompt.messages, text, reference="", tools=prompt.tools)
            for prompt, text in zip(answers.prompts, answers.texts, strict=True)
        ]
        replies = grader.ask(prompts, lambda done: context.progress(_PHASE, done, len(prompts)))
        grades = [rubric.grade(reply) for reply in replies]
        return [None if grade is None else float(grade) for grade in grades]
    name = f"metrics[{config.metrics.index(metric)}]" if metric in config.metrics else REWARD
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=TOKENS)
    scorer = build_scorer(name, metric, context.spec, tokenizer, answers.prompts, run, asking_of(context))
    progress = counted_progress(context, _PHASE, len(answers.texts))
    return metric_scores_of(scorer, answers, source=metric.source, progress=progress)


def _answers(tokenizer: Any, pairs: Sequence[PreferencePair]) -> Answers:
    """Each pair's chosen and rejected answer in turn, as scorers see them."""
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    prompts = [
        HeldOutPrompt(messages=pair.messages, tools=pair.tools, id=pair.id, row=pair.row, where=pair.where)
        for pair in pairs
        for _ in (CHOSEN, REJECTED)
    ]
    answered = iter(texts)

    def ids_of_answer(prompt: HeldOutPrompt) -> list[int]:
        return answer_ids(tokenizer, prompt.messages, next(answered), prompt.tools)

    return Answers(
        prompt_ids=tokenize_rows(prompts, lambda prompt: prompt_ids(tokenizer, prompt.messages, prompt.tools)),
        answer_ids=tokenize_rows(prompts, ids_of_answer),
        texts=texts,
        prompts=prompts,
        rows=range(len(texts)),
    )


def _line(pair: PreferencePair) -> dict[str, Any]:
    return {"id": pair.id, "where": pair.where}
