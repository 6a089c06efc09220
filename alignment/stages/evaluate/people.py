"""The judge ``people``: finds the votes of ``align judge`` and counts those on the arms' answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignment.config.evaluating import JudgeConfig
from alignment.core.errors import StageError
from alignment.core.fingerprint import file_sha256
from alignment.core.scripts import divided
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.answer_pairs import AnswerPair, pair_of
from alignment.evaluation.arms import Answered
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.tables import with_verdicts
from alignment.evaluation.votes_on_pairs import VotesOnPair, row_of, votes_on
from alignment.records.evaluation import Judge, JudgedPair
from alignment.records.votes import Vote, read_votes
from alignment.stages.evaluate.votes_file import FIELD
from alignment.training.context import StageContext

Points = Callable[[str, str], list[float | None]]
"""The points of an arm against another by the primary metric, one for each prompt; None without both scores."""


def by_people(
    config: JudgeConfig,
    context: StageContext,
    rows: Sequence[HeldOutPrompt],
    arms: Mapping[str, Answered],
    pairs: Sequence[tuple[str, str]],
    by_metric: Points | None,
    intervals: Intervals,
) -> tuple[Judge, list[dict[str, Any]]]:
    """The judge's table, and a line of ``judgements.jsonl`` for each vote that counts.

    If the recipe does not configure the pairs, those that people judged are added to ``pairs``.

    Raises:
        StageError: the votes are not those that the run was planned with.
        DataError: the file of votes is damaged.
    """
    votes = _votes(context)
    pairs = [*pairs, *(() if config.pairs else _other_pairs(votes, list(arms), pairs))]
    table: list[JudgedPair] = []
    lines: list[dict[str, Any]] = []
    voted: set[int] = set()
    for arm, against in pairs:
        judged = votes_on(votes, arm, against, _answer_pairs(rows, arms, arm, against))
        metric = None if by_metric is None else by_metric(arm, against)
        table.append(
            row_of(judged, extra_words=_extra_words(judged.pairs, arm, against), by_metric=metric, intervals=intervals)
        )
        lines += _lines(judged)
        keys = {vote.pair for vote in judged.votes}
        voted |= {row for row, pair in enumerate(judged.pairs) if pair.key in keys}
    return Judge(kind="people", name="the votes of people", num_prompts=len(voted), pairs=with_verdicts(table)), lines


def _votes(context: StageContext) -> list[Vote]:
    path = context.spec.extra_data.get(FIELD)
    if path is None:
        return []
    if not path.is_file() or file_sha256(path) != context.spec.identity["files"][FIELD]:
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


def _answer_pairs(
    rows: Sequence[HeldOutPrompt], arms: Mapping[str, Answered], arm: str, against: str
) -> list[AnswerPair]:
    """The first answers of two arms to every prompt, as ``align judge`` shows them."""
    return [
        pair_of(
            [message.as_dict() for message in row.messages],
            {name: arms[name].exchanges[index][0].text for name in (arm, against)},
            id=row.id,
            task=row.task,
        )
        for index, row in enumerate(rows)
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
