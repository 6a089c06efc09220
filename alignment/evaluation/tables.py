"""What an evaluation says, as plain data for ``evaluation.json`` and ``samples.jsonl`` (docs/design/0001)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from alignment.config.stage import UNTRAINED_ARMS
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.arms import Answer, Answered
from alignment.evaluation.bootstrap import Interval, mean_interval, ratio_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """How intervals are drawn: the same resamples of prompts for every figure."""

    samples: int
    seed: int

    def of(self, values: list[float]) -> Interval:
        """The mean over prompts with its 95 % interval."""
        return mean_interval(values, samples=self.samples, seed=self.seed)

    def of_ratio(self, values: list[float], sizes: list[int]) -> Interval:
        """Σ values / Σ sizes with its 95 % interval."""
        return ratio_interval(values, sizes, samples=self.samples, seed=self.seed)


def label(arm: str) -> str:
    """``stage:dpo`` → ``dpo``."""
    return arm.removeprefix("stage:")


def arm_row(
    name: str,
    arm: Answered,
    *,
    rewards: list[float] | None,
    divergences: list[float] | None,
    intervals: Intervals,
) -> dict[str, Any]:
    """One arm's line of the table; ``divergences`` are log π − log ref of its answers, in nats."""
    answers = arm.answers
    return {
        "name": name,
        "label": label(name),
        "gold": asdict(intervals.of([answer.gold.gold for answer in answers])),
        "style": asdict(intervals.of([answer.gold.style for answer in answers])),
        "facts": asdict(intervals.of([answer.gold.facts for answer in answers])),
        "words": sum(len(answer.text.split()) for answer in answers) / len(answers),
        "reward": None if rewards is None else asdict(intervals.of(rewards)),
        "kl": None if divergences is None else asdict(intervals.of(divergences)),
        "distinct": len({answer.text for answer in answers}) / len(answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "seconds": arm.seconds,
    }


def compare(arms: dict[str, Answered], *, reference: str, intervals: Intervals) -> list[dict[str, Any]]:
    """Paired differences in gold: the reference arm against the untrained, trained arms against it and each other."""
    trained = [name for name in arms if name not in (*UNTRAINED_ARMS, reference)]
    pairs = [("base+prompt", "base"), (reference, "base"), (reference, "base+prompt")]
    pairs += [(name, reference) for name in trained]
    pairs += [(later, earlier) for place, later in enumerate(trained) for earlier in trained[:place]]
    kept = {frozenset(pair): pair for pair in reversed(pairs) if len(set(pair)) == 2 and set(pair) <= set(arms)}
    return [_difference(arms, one, other, intervals) for one, other in reversed(kept.values())]


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
    interval = intervals.of([mine.gold.gold - theirs.gold.gold for mine, theirs in paired])
    return {
        "arm": arm,
        "against": against,
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "real": interval.excludes_zero(),
    }


def _sample(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "gold": answer.gold.gold,
        "style": answer.gold.style,
        "facts": answer.gold.facts,
        "checks": answer.gold.checks,
    }
