"""What an evaluation says, as plain data for ``evaluation.json`` and ``samples.jsonl`` (docs/design/0001)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignment.config.evaluation import FEW_SHOT, PROMPTED, UNTRAINED_ARMS
from alignment.core.errors import NonFiniteError
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.arms import Answer, Answered
from alignment.evaluation.bootstrap import detectable, mean_interval, ratio_interval
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
from alignment.records.interval import Interval

NOTHING = "nothing can be concluded"
_MOST = 700.0
"""Nats a token; exp of more is no float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """How intervals are drawn: the same resamples of prompts for every figure."""

    samples: int
    seed: int

    def of(self, values: list[float]) -> Interval:
        """The mean over prompts with its 95 % interval."""
        return mean_interval(values, samples=self.samples, seed=self.seed)

    def of_ratio(self, values: Sequence[float], sizes: Sequence[float]) -> Interval:
        """Σ values / Σ sizes with its 95 % interval."""
        return ratio_interval(values, sizes, samples=self.samples, seed=self.seed)


def refuse_not_finite(name: str, arm: Answered, *, rewards: list[float] | None, log_ratios: list[float] | None) -> None:
    """Raises NonFiniteError if a figure of the arm called ``name`` would be no number, on a single prompt."""
    losses = [-one.logprob / one.tokens for one in arm.references if one is not None]
    perplexities = [math.exp(loss) if loss < _MOST else math.inf for loss in losses]
    figures = {
        "reward": rewards or [],
        "greedy log-ratio": log_ratios or [],
        "loss": losses,
        "perplexity": perplexities,
    }
    for figure, values in figures.items():
        bad = [value for value in values if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"the {figure} of {name} is {bad[0]} on {len(bad)} of {len(values)} prompts",
                remedy="its training or the reward model's went wrong: lower the rate, or leave the arm out",
            )


def arm_row(
    name: str,
    arm: Answered,
    *,
    label: str,
    rewards: list[float] | None,
    log_ratios: list[float] | None,
    win_rate: dict[str, float] | None,
    intervals: Intervals,
) -> dict[str, Any]:
    """One arm's line of the table; ``log_ratios`` are log π − log ref of its greedy answers, in nats."""
    answers = arm.answers
    loss = _loss(arm, intervals)
    return {
        "name": name,
        "label": label,
        "gold": asdict(intervals.of([answer.gold.gold for answer in answers])),
        "style": asdict(intervals.of([answer.gold.style for answer in answers])),
        "facts": asdict(intervals.of([answer.gold.facts for answer in answers])),
        "words": asdict(intervals.of([float(len(answer.text.split())) for answer in answers])),
        "reward": None if rewards is None else asdict(intervals.of(rewards)),
        "greedy_log_ratio": None if log_ratios is None else asdict(intervals.of(log_ratios)),
        "win_rate": win_rate,
        "loss": None if loss is None else asdict(loss),
        "perplexity": None if loss is None else {key: math.exp(value) for key, value in asdict(loss).items()},
        "refusals": asdict(intervals.of([float(is_refusal(answer.text)) for answer in answers])),
        "distinct": len({answer.text for answer in answers}) / len(answers),
        "ended": asdict(intervals.of([float(answer.ended) for answer in answers])),
        "seconds": arm.seconds,
    }


def _loss(arm: Answered, intervals: Intervals) -> Interval | None:
    """Nats a token of the reference answers, over all tokens of all of them; None where there is none."""
    told = [one for one in arm.references if one is not None]
    return intervals.of_ratio([-one.logprob for one in told], [float(one.tokens) for one in told]) if told else None


def compare(arms: dict[str, Answered], *, reference: str, intervals: Intervals) -> list[dict[str, Any]]:
    """Paired differences in gold: the reference arm against the untrained, trained arms against it and each other."""
    trained = [name for name in arms if name not in (*UNTRAINED_ARMS, reference)]
    told = (PROMPTED, FEW_SHOT)
    pairs = [*((name, "base") for name in told), *((reference, name) for name in UNTRAINED_ARMS)]
    pairs += [(name, reference) for name in trained]
    pairs += [(later, earlier) for place, later in enumerate(trained) for earlier in trained[:place]]
    kept = {frozenset(pair): pair for pair in reversed(pairs) if len(set(pair)) == 2 and set(pair) <= set(arms)}
    return [_difference(arms, one, other, intervals) for one, other in reversed(kept.values())]


def judged_pair(
    arm: str,
    against: str,
    points: Sequence[float | None],
    both: Sequence[BothOrders] | None,
    *,
    gold: Sequence[float] | None,
    max_invalid: float,
    intervals: Intervals,
) -> dict[str, Any]:
    """A line of the judge's table: ``points`` are the arm's on each prompt, None where a verdict is invalid.

    ``both`` are the verdicts behind them, None for a judge of scores; ``gold`` the points by the gold rule, to hold
    against the judge's. With more than a share of ``max_invalid`` of invalid verdicts there is no win rate.
    """
    counted = [place for place, value in enumerate(points) if value is not None]
    valid = [value for value in points if value is not None]
    invalid = 0.0 if both is None else invalid_share(both)
    rate = intervals.of(valid) if valid and invalid <= max_invalid else None
    beside = None if gold is None or not valid else [gold[place] for place in counted]
    return {
        "arm": arm,
        "against": against,
        "prompts": len(points),
        "wins": valid.count(WIN),
        "ties": valid.count(TIE),
        "losses": valid.count(LOSS),
        "win_rate": None if rate is None else asdict(rate),
        "verdict": NOTHING if rate is None else _against_even(rate),
        "invalid": invalid,
        "agreement": None if both is None else agreement(both),
        "position_bias": None if both is None else position_bias(both),
        "gold_agreement": None if beside is None else same_share(valid, beside),
        "gold_kappa": None if beside is None else kappa(valid, beside),
    }


def _against_even(rate: Interval) -> str:
    low, high = rate.bounds or (TIE, TIE)
    if low > TIE:
        return "better"
    return "worse" if high < TIE else "no real difference"


def by_task(rows: list[HeldOutPrompt], arms: dict[str, Answered]) -> dict[str, dict[str, float]]:
    """Mean gold of each arm on each kind of task."""
    tasks: dict[str, dict[str, float]] = {}
    for task in sorted({row.task for row in rows if row.task}):
        places = [place for place, row in enumerate(rows) if row.task == task]
        tasks[task] = {
            name: sum(arm.answers[place].gold.gold for place in places) / len(places) for name, arm in arms.items()
        }
    return tasks


def samples(rows: list[HeldOutPrompt], arms: dict[str, Answered]) -> list[dict[str, Any]]:
    """Every prompt with every arm's answer and what the rule found."""
    return [
        {
            "id": row.id,
            "task": row.task,
            "messages": [message.as_dict() for message in row.messages],
            "reference": row.reference,
            "answers": {name: _sample(arm.answers[place]) for name, arm in arms.items()},
        }
        for place, row in enumerate(rows)
    ]


def _difference(arms: dict[str, Answered], arm: str, against: str, intervals: Intervals) -> dict[str, Any]:
    paired = zip(arms[arm].answers, arms[against].answers, strict=True)
    differences = [mine.gold.gold - theirs.gold.gold for mine, theirs in paired]
    interval = intervals.of(differences)
    return {
        "arm": arm,
        "against": against,
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "real": interval.excludes_zero(),
        "detectable": detectable(differences),
    }


def _sample(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "gold": answer.gold.gold,
        "style": answer.gold.style,
        "facts": answer.gold.facts,
        "checks": answer.gold.checks,
    }
