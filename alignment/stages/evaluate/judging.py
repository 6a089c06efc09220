"""Judges pairs of answers: by a model, and by people's votes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.config.evaluating import JudgeConfig, JudgeKind
from alignment.core.errors import StageError
from alignment.core.fingerprint import file_sha256
from alignment.core.wording import divided
from alignment.data.mix import some
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.answer_pairs import AnswerPair, pair_of
from alignment.evaluation.arms import Answer, Answered, Scores, grouped, of_prompts
from alignment.evaluation.endpoint import Endpoint, SavedReplies
from alignment.evaluation.statistics import Intervals
from alignment.evaluation.tables import judged_pair, with_verdicts
from alignment.evaluation.verdicts import (
    BothOrders,
    conversations_prompt,
    judge_prompt,
    pairs_of,
    points_of,
    verdict_of,
)
from alignment.evaluation.votes_on_pairs import VotesOnPair, row_of, votes_on
from alignment.records.evaluation import Judge, JudgedPair, Metric
from alignment.records.interval import Interval
from alignment.records.votes import Vote, read_votes
from alignment.stages.evaluate.kind import VOTES
from alignment.training.context import StageContext

Points = Callable[[str, str], list[float | None]]
"""The points of an arm against another by the primary metric, one for each prompt; None without both scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredArms:
    """Every arm's scores by one metric."""

    metric: Metric
    by_arm: Scores

    def score(self, arm: str, index: int) -> float | None:
        return self.by_arm[arm][index] if arm in self.by_arm else None

    def scored(self, indices: Sequence[int]) -> list[int]:
        """Those of the prompts ``indices`` that have a score."""
        return [index for index in indices if any(self.score(arm, index) is not None for arm in self.by_arm)]

    def points(self, arm: str, against: str, indices: Sequence[int]) -> list[float | None]:
        """The arm's points on the prompts ``indices``; the better score wins. None where an arm has no score."""
        better, other = (arm, against) if self.metric.higher_is_better else (against, arm)
        return [points_of(self.score(better, index), self.score(other, index)) for index in indices]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswers:
    """Every arm's answers to the held-out prompts and their scores, each by arm. ``rewards`` and ``log_ratios`` (nats
    per sequence) have one value per answer, or None for an arm that has none. ``turn_scores`` has one value per answer
    for each metric of an arm."""

    rows: Sequence[HeldOutPrompt]
    arms: Mapping[str, Answered]
    rewards: Mapping[str, list[float] | None]
    log_ratios: Mapping[str, list[float] | None]
    turn_scores: Mapping[str, Scores]
    metrics: Sequence[Metric]
    primary_name: str | None
    reference: str
    intervals: Intervals

    @property
    def primary(self) -> ScoredArms | None:
        metric = next((metric for metric in self.metrics if metric.name == self.primary_name), None)
        return None if metric is None else ScoredArms(metric=metric, by_arm=self.by_metric(metric.name))

    def by_metric(self, metric: str) -> dict[str, Sequence[float | None]]:
        """The scores by one metric of every arm that has it, one value per prompt."""
        return {
            name: of_prompts(self.arms[name], scores[metric])
            for name, scores in self.turn_scores.items()
            if metric in scores
        }


def by_people(
    config: JudgeConfig,
    context: StageContext,
    scored: ScoredAnswers,
    pairs: Sequence[tuple[str, str]],
    by_metric: Points | None,
) -> tuple[Judge, list[dict[str, Any]]]:
    """The judge's table, and a line of ``judgements.jsonl`` for each vote that counts. If the recipe does not configure
    the pairs, those that people judged are added to ``pairs``."""
    votes = _votes(context)
    pairs = [*pairs, *(() if config.pairs else _other_pairs(votes, list(scored.arms), pairs))]
    table: list[JudgedPair] = []
    lines: list[dict[str, Any]] = []
    voted: set[int] = set()
    for arm, against in pairs:
        judged = votes_on(votes, arm, against, _answer_pairs(scored, arm, against))
        metric = None if by_metric is None else by_metric(arm, against)
        words = _extra_words(judged.pairs, arm, against)
        table.append(row_of(judged, extra_words=words, by_metric=metric, intervals=scored.intervals))
        lines += _lines(judged)
        keys = {vote.pair for vote in judged.votes}
        voted |= {row for row, pair in enumerate(judged.pairs) if pair.key in keys}
    return Judge(kind="people", name="the votes of people", num_prompts=len(voted), pairs=with_verdicts(table)), lines


def _votes(context: StageContext) -> list[Vote]:
    path = context.spec.extra_data.get(VOTES)
    if path is None:
        return []
    if not path.is_file() or file_sha256(path) != context.spec.identity["files"][VOTES]:
        raise StageError(
            "the votes have changed since the run was planned",
            where=str(path),
            remedy="run again when nobody is judging; the answers are stored, so this takes little time",
        )
    return read_votes(path)


def _other_pairs(votes: Sequence[Vote], arms: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of arms with votes that are not among ``pairs``; wins are counted for the later of two arms."""
    voted = [frozenset(vote.answers) for vote in votes if set(vote.answers) <= set(arms)]
    named = {frozenset(pair) for pair in pairs}
    in_order = [sorted(pair, key=arms.index, reverse=True) for pair in dict.fromkeys(voted) if pair not in named]
    return [(arm, against) for arm, against in in_order]


def _answer_pairs(scored: ScoredAnswers, arm: str, against: str) -> list[AnswerPair]:
    """The first answers of two arms to every prompt, as ``align judge`` shows them."""
    return [
        pair_of(
            [message.as_dict() for message in row.messages],
            {name: scored.arms[name].exchanges[index][0].text for name in (arm, against)},
            id=row.id,
            task=row.task,
        )
        for index, row in enumerate(scored.rows)
    ]


def _extra_words(pairs: Sequence[AnswerPair], arm: str, against: str) -> list[float]:
    return [float(len(divided(pair.answers[arm])) - len(divided(pair.answers[against]))) for pair in pairs]


def _lines(judged: VotesOnPair) -> list[dict[str, Any]]:
    """The votes by prompt, without the texts, which ``samples.jsonl`` has."""
    rows = {pair.key: row for row, pair in reversed(list(enumerate(judged.pairs)))}
    return [
        {
            "id": judged.pairs[rows[vote.pair]].id,
            "row": rows[vote.pair],
            "arm": judged.arm,
            "against": judged.against,
            "annotator": vote.annotator,
            "shown_first": vote.shown_first,
            "preferred": vote.preferred,
            "points": vote.points(judged.arm),
        }
        for vote in sorted(judged.votes, key=lambda vote: rows[vote.pair])
    ]


REPLIES = "judgements.work.jsonl"
"""Replies of an endpoint while the stage runs, in its work folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A judge's results: its part of ``evaluation.json``, and the lines of ``judgements.jsonl``."""

    table: Judge | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def win_rate(self, arm: str, *, reference: str) -> Interval | None:
        """The arm's share of points against the reference, with its interval, if the two were judged."""
        pairs = [] if self.table is None else self.table.pairs
        return next((pair.win_rate for pair in pairs if (pair.arm, pair.against) == (arm, reference)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """Two arms on the judged prompts: points of ``arm``, None for an invalid verdict; and an endpoint's verdicts."""

    arm: str
    against: str
    points: list[float | None]
    both: list[BothOrders] | None = None


def open_endpoint(config: JudgeConfig, context: StageContext) -> Endpoint | None:
    """The endpoint, or None if another judge or none is configured. Call it first, so that errors come early."""
    if config.kind is not JudgeKind.endpoint:
        return None
    replies = SavedReplies(context.spec.work / REPLIES)
    return Endpoint(config.endpoint, replies, where=f"stages.{context.spec.stage}.judge")


def judge(config: JudgeConfig, context: StageContext, scored: ScoredAnswers, endpoint: Endpoint | None) -> Judged:
    """Judges all pairs on the same prompts; the result is empty if no judge is configured."""
    if config.kind is JudgeKind.none:
        return Judged()
    rows, arms, primary = scored.rows, scored.arms, scored.primary
    pairs = pairs_of(config, list(arms), reference=scored.reference)
    compared_with = primary if _judges_what_metrics_score(config, arms) else None
    if config.kind is JudgeKind.people:
        every = range(len(rows))
        by_metric = None if compared_with is None else lambda arm, against: compared_with.points(arm, against, every)
        table, lines = by_people(config, context, scored, pairs, by_metric)
        return Judged(table=table, lines=lines)
    indices = some(len(rows), config.max_prompts, context.generator("judge"))
    if endpoint is not None:
        judged, lines = _by_endpoint(config, context, endpoint, scored, pairs, indices)
        name = config.endpoint.model
    elif config.kind is JudgeKind.metric:
        assert primary is not None, "the plan refuses to judge by a metric where there is none"
        indices = primary.scored(indices) or indices
        judged, lines = _by_scores(rows, primary, pairs, indices)
        name = primary.metric.name
    else:
        rewards = {name: arms[name].means(of_arm) for name, of_arm in scored.rewards.items() if of_arm is not None}
        judged, lines = _by_scores(rows, ScoredArms(metric=Metric(name="reward"), by_arm=rewards), pairs, indices)
        name = "the reward model"
    table = Judge(
        kind=config.kind.value,
        name=name,
        num_prompts=len(indices),
        pairs=with_verdicts([_row(pair, config, scored, compared_with, indices) for pair in judged]),
    )
    return Judged(table=table, lines=lines)


def _row(
    pair: _Pair, config: JudgeConfig, scored: ScoredAnswers, primary: ScoredArms | None, indices: Sequence[int]
) -> JudgedPair:
    """A pair's row in the table; the judge is compared with ``primary``, which is None if it is the judge itself."""
    arms = [scored.arms[name] for name in (pair.arm, pair.against)]
    words, words_against = (_words(arm, config, indices) for arm in arms)
    by_metric = None
    if primary is not None:  # None where the answers are identical, so nothing could disagree
        texts, texts_against = (_texts(arm, config) for arm in arms)
        points = zip(indices, primary.points(pair.arm, pair.against, indices), strict=True)
        by_metric = [None if texts[index] == texts_against[index] else point for index, point in points]
    return judged_pair(
        pair.arm,
        pair.against,
        pair.points,
        pair.both,
        extra_words=[count - other for count, other in zip(words, words_against, strict=True)],
        by_metric=by_metric,
        max_invalid=config.max_invalid,
        intervals=scored.intervals,
    )


def _judges_what_metrics_score(config: JudgeConfig, arms: Mapping[str, Answered]) -> bool:
    """Whether the judge is another one than the metric, and about the same answers: an endpoint and people judge the
    first to each prompt, and a metric scores all."""
    of_first = config.kind in (JudgeKind.endpoint, JudgeKind.people)
    return config.kind is not JudgeKind.metric and not (of_first and any(arm.per_prompt > 1 for arm in arms.values()))


def _texts(arm: Answered, config: JudgeConfig) -> list[Sequence[Sequence[str]]]:
    """The judged answers by prompt and turn: the first to each turn, or all, as in ``_words``."""
    groups = grouped([answer.text.strip() for answer in arm.answers], arm.per_prompt)
    of_first = config.kind is JudgeKind.endpoint
    return arm.by_prompt([texts[:1] for texts in groups] if of_first else groups)


def _words(arm: Answered, config: JudgeConfig, indices: Sequence[int]) -> list[float]:
    """How long the judged answers are: the first to each turn, or on average all, for a judge of all scores."""
    counts = [float(len(divided(answer.text))) for answer in arm.answers]
    of_first = config.kind is JudgeKind.endpoint
    of_prompts = arm.of_prompts(counts[:: arm.per_prompt]) if of_first else arm.means(counts)
    return [of_prompts[index] for index in indices]


def _by_scores(
    rows: Sequence[HeldOutPrompt], scores: ScoredArms, pairs: Sequence[tuple[str, str]], indices: Sequence[int]
) -> tuple[list[_Pair], list[dict[str, Any]]]:
    judged, lines = [], []
    for arm, against in pairs:
        points = scores.points(arm, against, indices)
        judged.append(_Pair(arm=arm, against=against, points=points))
        for index, point in zip(indices, points, strict=True):
            both = {"arm_score": scores.score(arm, index), "against_score": scores.score(against, index)}
            lines.append(_line(rows, index, arm, against) | both | {"points": point})
    return judged, lines


def _by_endpoint(
    config: JudgeConfig,
    context: StageContext,
    endpoint: Endpoint,
    scored: ScoredAnswers,
    pairs: Sequence[tuple[str, str]],
    indices: Sequence[int],
) -> tuple[list[_Pair], list[dict[str, Any]]]:
    rows, arms = scored.rows, scored.arms
    shown = [
        (arm, against, index, order)
        for arm, against in pairs
        for index in indices
        for order in ((arm, against), (against, arm))
    ]
    exchanges = {name: arm.exchanges for name, arm in arms.items()}
    prompts = [
        _prompt(rows[index], *(exchanges[name][index] for name in order), criteria=config.endpoint.criteria)
        for _, _, index, order in shown
    ]
    both, replies = in_both_orders(endpoint, context, prompts, [order[0] for *_, order in shown], phase="judging")
    lines = [
        _line(rows, index, arm, against) | reply for (arm, against, index, _), reply in zip(shown, replies, strict=True)
    ]
    judged = []
    for number, (arm, against) in enumerate(pairs):
        own = both[number * len(indices) : (number + 1) * len(indices)]
        judged.append(_Pair(arm=arm, against=against, points=[orders.points for orders in own], both=own))
    return judged, lines


def _prompt(row: HeldOutPrompt, first: Sequence[Answer], second: Sequence[Answer], *, criteria: str) -> str:
    """The judge's prompt; a row of several turns is judged by the whole conversation."""
    first_texts, second_texts = ([answer.text for answer in exchange] for exchange in (first, second))
    if row.num_turns == 1:
        return judge_prompt(row.messages, *first_texts, *second_texts, criteria=criteria, tools=row.tools)
    return conversations_prompt(
        row.messages, row.later_turns, first_texts, second_texts, criteria=criteria, tools=row.tools
    )


def _line(rows: Sequence[HeldOutPrompt], index: int, arm: str, against: str) -> dict[str, Any]:
    return {"id": rows[index].id, "row": index, "arm": arm, "against": against}


def in_both_orders(
    endpoint: Endpoint, context: StageContext, prompts: Sequence[str], shown_first: Sequence[str], *, phase: str
) -> tuple[list[BothOrders], list[dict[str, Any]]]:
    """The verdicts on each two neighbouring prompts, and every reply as part of a line of results. ``shown_first`` are
    the answers that the judge sees first."""
    replies = endpoint.ask(prompts, lambda done: context.progress(phase, done, len(prompts)))
    verdicts = [verdict_of(reply) for reply in replies]
    lines = [
        {"shown_first": first, "verdict": verdict.value, "text": reply}
        for first, verdict, reply in zip(shown_first, verdicts, replies, strict=True)
    ]
    return [BothOrders(arm_first=v, arm_second=w) for v, w in zip(verdicts[::2], verdicts[1::2], strict=True)], lines
