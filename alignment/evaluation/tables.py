"""The tables of an evaluation: figures of each arm, judged pairs, tasks and sample answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from alignment.core.errors import NonFiniteError
from alignment.core.wording import divided
from alignment.data.records import HeldOutPrompt
from alignment.evaluation import bag_of_words
from alignment.evaluation.arms import Answered, Scores, grouped, known, of_prompts
from alignment.evaluation.refusals import is_refusal
from alignment.evaluation.statistics import Intervals, holm, sign_flip_p_values
from alignment.evaluation.verdicts import (
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
from alignment.records.evaluation import (
    BETTER,
    FEWEST_PROMPTS,
    LEVEL,
    NO_DIFFERENCE,
    NOTHING,
    TOO_FEW,
    WORSE,
    ArmResult,
    JudgedPair,
    Sample,
    SampleAnswer,
    TurnAnswer,
)
from alignment.records.interval import Interval

_MOST = 700.0
"""Nats per token; exp of more overflows a float."""


def refuse_not_finite(name: str, arm: Answered, *, rewards: list[float] | None, log_ratios: list[float] | None) -> None:
    """Raises NonFiniteError if a figure of the arm called ``name`` is not finite on any prompt."""
    losses = [-reference.logprob / reference.tokens for reference in arm.references if reference is not None]
    perplexities = [math.exp(loss) if loss < _MOST else math.inf for loss in losses]
    metrics = {"reward": rewards or [], "log-ratio": log_ratios or [], "loss": losses, "perplexity": perplexities}
    for metric, values in metrics.items():
        bad = [value for value in values if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"the {metric} of {name} is {bad[0]} on {len(bad)} of {len(values)} answers",
                remedy="its training or that of the reward model went wrong: lower the learning rate, or leave out "
                "the arm",
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
    """The figures of one arm. ``scores`` are by metric, one per turn; ``rewards`` and ``log_ratios`` have one entry per
    answer. ``log_ratios`` are log π − log reference of its answers, in nats, which are summed over the turns of a
    conversation. Of answers ``sampled`` from the policy they estimate the KL divergence, an expectation; of greedy ones
    they do not."""
    answers, loss = arm.answers, _loss(arm, intervals)
    first_texts = [answer.text for answer in answers[:: arm.per_prompt]]  # further samples may well be the same
    return ArmResult(
        name=name,
        label=label,
        metrics={metric: intervals.of_scores(known(of_prompts(arm, values))) for metric, values in scores.items()},
        by_turn=_by_turn(arm, scores, intervals),
        words=intervals.of(arm.means([float(len(divided(answer.text))) for answer in answers])),
        reward=None if rewards is None else intervals.of(arm.means(rewards)),
        greedy_log_ratio=None if log_ratios is None or sampled else intervals.of(arm.sums(log_ratios)),
        kl=None if log_ratios is None or not sampled else intervals.of(arm.sums(log_ratios)),
        win_rate=win_rate,
        loss=loss,
        perplexity=None if loss is None else loss.through(math.exp),
        refusals=intervals.of_scores(arm.means([float(is_refusal(answer.text)) for answer in answers])),
        distinct=len(set(first_texts)) / len(first_texts),
        ended=intervals.of_scores(arm.means([float(answer.ended) for answer in answers])),
        seconds=arm.seconds,
    )


def _by_turn(arm: Answered, scores: Scores, intervals: Intervals) -> list[dict[str, Interval]]:
    """The metrics of each turn by itself, over the prompts that have it; empty if no prompt has a second one. A metric
    without any score in a turn is left out there."""
    longest = max(arm.turns, default=1)
    groups = {metric: arm.by_prompt(values) for metric, values in scores.items()}
    return [
        {
            metric: intervals.of_scores(of_turn)
            for metric, of_metric in groups.items()
            if (of_turn := known([of_turns[turn] for of_turns in of_metric if turn < len(of_turns)]))
        }
        for turn in range(longest if longest > 1 else 0)
    ]


def _loss(arm: Answered, intervals: Intervals) -> Interval | None:
    """Nats per token over all tokens of all reference answers; None without reference answers."""
    known = ([sums for sums in of_prompt if sums is not None] for of_prompt in arm.by_prompt(arm.references))
    of_prompts = [sums for sums in known if sums]
    if not of_prompts:
        return None
    return intervals.of_ratio(
        [-sum(reference.logprob for reference in sums) for sums in of_prompts],
        [float(sum(reference.tokens for reference in sums)) for sums in of_prompts],
    )


def judged_pair(
    arm: str,
    against: str,
    points: Sequence[float | None],
    both: Sequence[BothOrders] | None,
    *,
    extra_words: Sequence[float],
    by_metric: Sequence[float | None] | None,
    max_invalid: float,
    intervals: Intervals,
) -> JudgedPair:
    """A row of the judge's table: ``points`` are the arm's on each prompt, None where a verdict is invalid.
    ``extra_words`` says by how many words the arm's answer is longer. ``both`` are the verdicts that gave the points,
    None for a judge that compares scores. ``by_metric`` are the points by the primary metric, to compare with the
    judge's, None where it has no score or the answers are identical. If the share of invalid verdicts exceeds
    ``max_invalid``, there is no win rate. The verdict is that of a single pair (``with_verdicts``)."""
    counted = [row for row, value in enumerate(points) if value is not None]
    valid = [value for value in points if value is not None]
    invalid = points.count(None) / len(points) if both is None else invalid_share(both)
    rate = intervals.of_points(valid) if valid and invalid <= max_invalid else None
    longer = [extra_words[row] for row in counted]
    at_equal_lengths = p = None
    if rate is not None:
        at_equal_lengths = bag_of_words.win_rate(valid, longer, samples=intervals.samples, seed=intervals.seed)
        (p,) = sign_flip_p_values([[value - TIE for value in valid]], seed=intervals.seed)
    both_judged = [(points[row], by_metric[row]) for row in counted] if by_metric is not None else []
    compared = [(own, other) for own, other in both_judged if own is not None and other is not None]
    own_points, metric_points = [own for own, _ in compared], [other for _, other in compared]
    pair = JudgedPair(
        arm=arm,
        against=against,
        prompts=len(points),
        wins=valid.count(WIN),
        ties=valid.count(TIE),
        losses=valid.count(LOSS),
        win_rate=rate,
        length_controlled=at_equal_lengths,
        p=p,
        invalid=invalid,
        agreement=None if both is None else agreement(both),
        position_bias=None if both is None else position_bias(both),
        metric_agreement=same_share(own_points, metric_points) if compared else None,
        metric_kappa=kappa(own_points, metric_points) if compared else None,
        metric_prompts=len(compared) or None,
    )
    return with_verdicts([pair])[0]


def with_verdicts(pairs: Sequence[JudgedPair]) -> list[JudgedPair]:
    """The pairs of a judge's table, with p values that are corrected for their number and the verdicts that follow."""
    tested = [index for index, pair in enumerate(pairs) if pair.p is not None]
    corrected = dict(zip(tested, holm([pairs[index].p or 0.0 for index in tested]), strict=True))
    return [_with_verdict(pair, corrected.get(index)) for index, pair in enumerate(pairs)]


def _with_verdict(pair: JudgedPair, adjusted_p: float | None) -> JudgedPair:
    if pair.win_rate is None or adjusted_p is None:
        return replace(pair, verdict=NOTHING)
    verdict = NO_DIFFERENCE
    if pair.counted < FEWEST_PROMPTS:
        verdict = TOO_FEW
    elif adjusted_p < LEVEL:
        verdict = BETTER if pair.win_rate.mean > TIE else WORSE
    return replace(pair, adjusted_p=adjusted_p, verdict=verdict)


def by_task(rows: Sequence[HeldOutPrompt], scores: Scores) -> dict[str, dict[str, float]]:
    """Each arm's mean score by task; ``scores`` are by arm. A task without any score is left out."""
    tasks: dict[str, dict[str, float]] = {}
    for task in sorted({row.task for row in rows if row.task}):
        indices = [index for index, row in enumerate(rows) if row.task == task]
        by_arm = {name: known([values[index] for index in indices]) for name, values in scores.items()}
        means = {name: sum(values) / len(values) for name, values in by_arm.items() if values}
        tasks |= {task: means} if means or not scores else {}
    return tasks


def samples(rows: Sequence[HeldOutPrompt], arms: Mapping[str, Answered], scores: Mapping[str, Scores]) -> list[Sample]:
    """Every prompt with every arm's answer; ``scores`` are by arm, then by metric, one per turn."""
    of_arms = {name: _sample_answers(arm, scores[name]) for name, arm in arms.items()}
    return [
        Sample(
            id=row.id,
            task=row.task,
            messages=[message.as_dict() for message in row.messages],
            reference=row.reference,
            later_turns=list(row.later_turns),
            later_references=list(row.later_references) if any(row.later_references) else [],
            choices=list(row.choices),
            tools=[dict(tool) for tool in row.tools],
            answers={name: answers[index] for name, answers in of_arms.items()},
        )
        for index, row in enumerate(rows)
    ]


def _sample_answers(arm: Answered, scores: Scores) -> list[SampleAnswer]:
    of_metrics = {metric: of_prompts(arm, values) for metric, values in scores.items()}
    turns = [
        TurnAnswer(text=answers[0].text, further=[a.text for a in answers[1:]], scores=_at(scores, number))
        for number, answers in enumerate(grouped(arm.answers, arm.per_prompt))
    ]
    return [
        SampleAnswer(
            text=of_prompt[0].text,
            further=of_prompt[0].further,
            scores=_at(of_metrics, index),
            turns=list(of_prompt) if len(of_prompt) > 1 else [],
        )
        for index, of_prompt in enumerate(arm.by_prompt(turns))
    ]


def _at(scores: Scores, index: int) -> dict[str, float]:
    return {metric: score for metric, values in scores.items() if (score := values[index]) is not None}
