"""The tables of an evaluation: figures of each arm, judged pairs, tasks and sample answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alignment.core.errors import NonFiniteError
from alignment.data.records import HeldOutPrompt
from alignment.evaluation import length_controlled
from alignment.evaluation.arms import Answered, grouped
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.pairwise import (
    LOSS,
    TIE,
    WIN,
    BothOrders,
    agreement,
    invalid_share,
    kappa,
    position_bias,
    same_share,
)
from alignment.evaluation.refusals import is_refusal
from alignment.records.evaluation import (
    BETTER,
    NO_DIFFERENCE,
    NOTHING,
    WORSE,
    ArmResult,
    JudgedPair,
    Sample,
    SampleAnswer,
)
from alignment.records.interval import Interval

Scores = Mapping[str, Sequence[float]]
"""One score per prompt, keyed by the name of a metric or an arm."""

_MOST = 700.0
"""Nats per token; exp of more overflows a float."""


def refuse_not_finite(name: str, arm: Answered, *, rewards: list[float] | None, log_ratios: list[float] | None) -> None:
    """Raises NonFiniteError if a figure of the arm called ``name`` is not finite on any prompt."""
    losses = [-reference.logprob / reference.tokens for reference in arm.references if reference is not None]
    perplexities = [math.exp(loss) if loss < _MOST else math.inf for loss in losses]
    metrics = {
        "reward": rewards or [],
        "log-ratio": log_ratios or [],
        "loss": losses,
        "perplexity": perplexities,
    }
    for metric, values in metrics.items():
        bad = [value for value in values if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"the {metric} of {name} is {bad[0]} on {len(bad)} of {len(values)} answers",
                remedy="its training or the reward model's went wrong: lower the learning rate, or leave the arm out",
            )


def arm_result(
    name: str,
    arm: Answered,
    *,
    label: str,
    scores: Scores,
    rewards: list[float] | None,
    log_ratios: list[float] | None,
    win_rate: Interval | None,
    intervals: Intervals,
    sampled: bool = False,
) -> ArmResult:
    """The figures of one arm.

    ``scores`` are by metric, one per prompt; ``rewards`` and ``log_ratios`` have one entry per answer. ``log_ratios``
    are log π − log reference of its answers, in nats. Of answers ``sampled`` from the policy they estimate the KL
    divergence, an expectation; of greedy ones they do not.
    """
    answers = arm.answers
    loss = _loss(arm, intervals)
    return ArmResult(
        name=name,
        label=label,
        metrics={metric: intervals.of(list(values)) for metric, values in scores.items()},
        words=intervals.of(arm.means([float(len(answer.text.split())) for answer in answers])),
        reward=None if rewards is None else intervals.of(arm.means(rewards)),
        greedy_log_ratio=None if log_ratios is None or sampled else intervals.of(log_ratios),
        kl=None if log_ratios is None or not sampled else intervals.of(arm.means(log_ratios)),
        win_rate=win_rate,
        loss=loss,
        perplexity=None if loss is None else loss.through(math.exp),
        refusals=intervals.of(arm.means([float(is_refusal(answer.text)) for answer in answers])),
        distinct=len({answer.text for answer in answers}) / len(answers),
        ended=intervals.of(arm.means([float(answer.ended) for answer in answers])),
        seconds=arm.seconds,
    )


def _loss(arm: Answered, intervals: Intervals) -> Interval | None:
    """Nats per token over all tokens of all reference answers; None without reference answers."""
    sums = [reference for reference in arm.references if reference is not None]
    return (
        intervals.of_ratio([-reference.logprob for reference in sums], [float(reference.tokens) for reference in sums])
        if sums
        else None
    )


def judged_pair(
    arm: str,
    against: str,
    points: Sequence[float | None],
    both: Sequence[BothOrders] | None,
    *,
    extra_words: Sequence[float],
    by_metric: Sequence[float] | None,
    max_invalid: float,
    intervals: Intervals,
) -> JudgedPair:
    """A row of the judge's table: ``points`` are the arm's on each prompt, None where a verdict is invalid.

    ``extra_words`` says by how many words the arm's answer is longer. ``both`` are the verdicts that gave the points,
    None for a judge that compares scores. ``by_metric`` are the points by the primary metric, to compare with the
    judge's. If the share of invalid verdicts exceeds ``max_invalid``, there is no win rate.
    """
    counted = [row for row, value in enumerate(points) if value is not None]
    valid = [value for value in points if value is not None]
    invalid = 0.0 if both is None else invalid_share(both)
    rate = intervals.of(valid) if valid and invalid <= max_invalid else None
    longer = [extra_words[row] for row in counted]
    at_equal_lengths = None
    if rate is not None:
        at_equal_lengths = length_controlled.win_rate(valid, longer, samples=intervals.samples, seed=intervals.seed)
    metric_points = None if by_metric is None or not valid else [by_metric[row] for row in counted]
    return JudgedPair(
        arm=arm,
        against=against,
        prompts=len(points),
        wins=valid.count(WIN),
        ties=valid.count(TIE),
        losses=valid.count(LOSS),
        win_rate=rate,
        length_controlled=at_equal_lengths,
        verdict=NOTHING if rate is None else _against_even(rate),
        invalid=invalid,
        agreement=None if both is None else agreement(both),
        position_bias=None if both is None else position_bias(both),
        metric_agreement=None if metric_points is None else same_share(valid, metric_points),
        metric_kappa=None if metric_points is None else kappa(valid, metric_points),
    )


def _against_even(rate: Interval) -> str:
    low, high = rate.bounds or (TIE, TIE)
    if low > TIE:
        return BETTER
    return WORSE if high < TIE else NO_DIFFERENCE


def by_task(rows: Sequence[HeldOutPrompt], scores: Scores) -> dict[str, dict[str, float]]:
    """Each arm's mean score by task; ``scores`` are by arm."""
    tasks: dict[str, dict[str, float]] = {}
    for task in sorted({row.task for row in rows if row.task}):
        indices = [index for index, row in enumerate(rows) if row.task == task]
        tasks[task] = {name: sum(values[index] for index in indices) / len(indices) for name, values in scores.items()}
    return tasks


def samples(rows: Sequence[HeldOutPrompt], arms: Mapping[str, Answered], scores: Mapping[str, Scores]) -> list[Sample]:
    """Every prompt with every arm's answer; ``scores`` are by arm, then by metric."""
    return [
        Sample(
            id=row.id,
            task=row.task,
            messages=[message.as_dict() for message in row.messages],
            reference=row.reference,
            answers={
                name: SampleAnswer(
                    text=arm.first_answers[index].text,
                    further=[answer.text for answer in grouped(arm.answers, arm.per_prompt)[index][1:]],
                    scores={metric: values[index] for metric, values in scores[name].items()},
                )
                for name, arm in arms.items()
            },
        )
        for index, row in enumerate(rows)
    ]
