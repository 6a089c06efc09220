"""Pairs of arms before a judge: two scores compared, or a model behind an endpoint asked in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.config.evaluation import JudgeConfig, JudgeKind
from alignment.data.mix import some
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.arms import Answered
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.evaluation_record import Intervals, judged_pair
from alignment.evaluation.grammar import Verdict, judge_prompt, verdict_of
from alignment.evaluation.pairwise import BothOrders, pairs_of, points_of_scores
from alignment.training.context import StageContext

KEPT = "judgements.work.jsonl"
"""Replies of an endpoint while the stage runs, in its work folder."""

_NAMES = {JudgeKind.rule: "the gold rule", JudgeKind.reward: "the reward model"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What a judge said: its part of ``evaluation.json``, and a line for every call."""

    table: dict[str, Any] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def win_rate(self, arm: str, *, reference: str) -> dict[str, float] | None:
        """The arm's share of points against the reference, with its interval, if the two were judged."""
        pairs = [] if self.table is None else self.table["pairs"]
        return next((one["win_rate"] for one in pairs if (one["arm"], one["against"]) == (arm, reference)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """Two arms on some prompts: points for the first, None where a verdict is invalid; and both orders' verdicts."""

    arm: str
    against: str
    points: list[float | None]
    both: list[BothOrders] | None = None


def open_endpoint(config: JudgeConfig, context: StageContext) -> Endpoint | None:
    """The endpoint, if there is one to ask.

    Raises:
        ConfigError: its client is not installed, or its key not set; better said before anything is answered.
    """
    if config.kind is not JudgeKind.endpoint:
        return None
    return Endpoint(
        config.endpoint,
        context.spec.work / KEPT,
        where=f"stages.{context.spec.stage}.judge",
    )


def judge(
    config: JudgeConfig,
    context: StageContext,
    rows: Sequence[HeldOutPrompt],
    arms: Mapping[str, Answered],
    rewards: Mapping[str, list[float] | None],
    endpoint: Endpoint | None,
    *,
    reference: str,
    intervals: Intervals,
) -> Judged:
    """All pairs on the same prompts; nothing if no judge is asked for.

    Raises:
        StageError: a call of the endpoint fails.
    """
    if config.kind is JudgeKind.none:
        return Judged()
    places = some(len(rows), config.max_prompts, context.generator("judge"))
    pairs = pairs_of(config, list(arms), reference=reference)
    gold = {name: [arm.answers[place].gold.gold for place in places] for name, arm in arms.items()}
    if endpoint is not None:
        judged, lines = _by_endpoint(config, context, endpoint, rows, arms, pairs, places)
    elif config.kind is JudgeKind.rule:
        judged, lines = _by_scores(rows, gold, pairs, places)
    else:
        told = {name: found for name, found in rewards.items() if found is not None}
        scores = {name: [found[place] for place in places] for name, found in told.items()}
        judged, lines = _by_scores(rows, scores, pairs, places)
    table = {
        "kind": config.kind.value,
        "name": config.endpoint.model if endpoint is not None else _NAMES[config.kind],
        "num_prompts": len(places),
        "pairs": [_row(one, config, gold, intervals) for one in judged],
    }
    return Judged(table=table, lines=lines)


def _row(one: _Pair, config: JudgeConfig, gold: Mapping[str, list[float]], intervals: Intervals) -> dict[str, Any]:
    """A pair's line of the table; the gold rule is not held against itself."""
    beside = None if config.kind is JudgeKind.rule else points_of_scores(gold[one.arm], gold[one.against])
    return judged_pair(
        one.arm,
        one.against,
        one.points,
        one.both,
        gold=beside,
        max_invalid=config.max_invalid,
        intervals=intervals,
    )


def _by_scores(
    rows: Sequence[HeldOutPrompt],
    scores: Mapping[str, list[float]],
    pairs: Sequence[tuple[str, str]],
    places: Sequence[int],
) -> tuple[list[_Pair], list[dict[str, Any]]]:
    judged, lines = [], []
    for arm, against in pairs:
        points = points_of_scores(scores[arm], scores[against])
        judged.append(_Pair(arm=arm, against=against, points=[*points]))
        for number, place in enumerate(places):
            told = {"arm_score": scores[arm][number], "against_score": scores[against][number]}
            lines.append(_line(rows, place, arm, against) | told | {"points": points[number]})
    return judged, lines


def _by_endpoint(
    config: JudgeConfig,
    context: StageContext,
    endpoint: Endpoint,
    rows: Sequence[HeldOutPrompt],
    arms: Mapping[str, Answered],
    pairs: Sequence[tuple[str, str]],
    places: Sequence[int],
) -> tuple[list[_Pair], list[dict[str, Any]]]:
    """Every pair on every prompt in both orders; a call that failed is an invalid verdict."""
    shown = [
        (arm, against, place, order)
        for arm, against in pairs
        for place in places
        for order in ((arm, against), (against, arm))
    ]
    prompts = [
        judge_prompt(
            rows[place].messages,
            *(arms[name].answers[place].text for name in order),
            criteria=config.endpoint.criteria,
        )
        for _, _, place, order in shown
    ]
    replies = endpoint.ask(prompts, lambda done: context.progress("judging", done, len(prompts)))
    verdicts = [verdict_of(reply) for reply in replies]
    lines = [
        _line(rows, place, arm, against) | _told(order[0], verdict, reply)
        for (arm, against, place, order), verdict, reply in zip(shown, verdicts, replies, strict=True)
    ]
    both = [
        BothOrders(arm_first=verdicts[number], arm_second=verdicts[number + 1]) for number in range(0, len(shown), 2)
    ]
    judged = []
    for number, (arm, against) in enumerate(pairs):
        own = both[number * len(places) : (number + 1) * len(places)]
        judged.append(_Pair(arm=arm, against=against, points=[one.points for one in own], both=own))
    return judged, lines


def _line(rows: Sequence[HeldOutPrompt], place: int, arm: str, against: str) -> dict[str, Any]:
    return {"id": rows[place].id, "row": place, "arm": arm, "against": against}


def _told(first: str, verdict: Verdict, reply: str) -> dict[str, Any]:
    return {"shown_first": first, "verdict": verdict.value, "text": reply}
