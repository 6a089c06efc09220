"""Win rates from votes of people: points of each prompt, agreement between annotators, and what was not judged. A
prompt's points are the mean of its votes (1 for the arm, .5 for a tie, 0 for the other), so that a prompt counts once,
however many annotators judged it. The interval resamples prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from alignment.evaluation.answer_pairs import AnswerPair, krippendorff_alpha, queue
from alignment.evaluation.statistics import Intervals
from alignment.evaluation.tables import judged_pair
from alignment.evaluation.verdicts import LOSS, TIE, WIN, kappa, same_share
from alignment.records.evaluation import FEWEST_PROMPTS, JudgedByPeople, JudgedPair
from alignment.records.votes import Vote


@dataclass(frozen=True, kw_only=True, slots=True)
class VotesOnPair:
    """The votes on two arms: ``pairs`` in the order of the prompts, ``votes`` on them, and the number of ``stale``
    ones, which are about other prompts or answers of the same arms."""

    arm: str
    against: str
    pairs: Sequence[AnswerPair]
    votes: Sequence[Vote]
    stale: int

    @property
    def annotators(self) -> list[str]:
        return list(dict.fromkeys(vote.annotator for vote in self.votes))

    def points(self) -> list[float | None]:
        """The arm's points on each prompt; None for a prompt that nobody judged. Two equal answers are not shown to
        anybody. They tie, once the pairs that people judged reach beyond them in the ``queue``: counted all at once,
        they would weigh too much while only a part is judged."""
        votes = self._by_pair()
        judged = {key: mean(vote.points(self.arm) for vote in of_pair) for key, of_pair in votes.items()}
        counted = judged | dict.fromkeys(self._reached(votes), TIE)
        return [counted.get(pair.key) for pair in self.pairs]

    def _by_pair(self) -> dict[str, list[Vote]]:
        votes: dict[str, list[Vote]] = {}
        for vote in self.votes:
            votes.setdefault(vote.pair, []).append(vote)
        return votes

    def _reached(self, votes: dict[str, list[Vote]]) -> set[str]:
        """The keys of pairs of equal answers that come before the last judged pair, or all if nothing is left."""
        ordered = queue(self.pairs)
        judged = [index for index, pair in enumerate(ordered) if pair.key in votes]
        if not judged:
            return set()
        open_pairs = any(not pair.same and pair.key not in votes for pair in ordered)
        end = judged[-1] if open_pairs else len(ordered)
        return {pair.key for pair in ordered[:end] if pair.same}

    def alpha(self) -> float | None:
        return krippendorff_alpha([[vote.points(self.arm) for vote in votes] for votes in self._by_pair().values()])

    def position_bias(self) -> float | None:
        """Votes for the answer shown first minus those for the second, as a share of all votes."""
        leans = [2 * vote.points(vote.shown_first) - 1 for vote in self.votes]
        return mean(leans) if leans else None


def votes_on(votes: Iterable[Vote], arm: str, against: str, pairs: Sequence[AnswerPair]) -> VotesOnPair:
    """The votes on these two arms, in whichever order they name them."""
    about = [vote for vote in votes if set(vote.answers) == {arm, against}]
    keys = {pair.key for pair in pairs}
    current = [vote for vote in about if vote.pair in keys]
    return VotesOnPair(arm=arm, against=against, pairs=pairs, votes=current, stale=len(about) - len(current))


def row_of(
    judged: VotesOnPair,
    *,
    extra_words: Sequence[float],
    by_metric: Sequence[float | None] | None,
    intervals: Intervals,
) -> JudgedPair:
    """A row of the judge's table. ``wins`` are prompts on which the arm has more than half of the points.
    ``extra_words`` says by how many words the arm's answer is longer, ``by_metric`` are the points by the primary
    metric; both have an entry for each prompt. With fewer than ``FEWEST_PROMPTS`` judged prompts there is no win
    rate."""
    points = judged.points()
    voted = {vote.pair for vote in judged.votes}
    num_judged = sum(pair.key in voted for pair in judged.pairs)
    enough = num_judged >= FEWEST_PROMPTS
    sides = [_side(value) for value in points if value is not None]
    row = judged_pair(
        judged.arm,
        judged.against,
        points if enough else [None] * len(points),
        None,
        extra_words=extra_words,
        by_metric=None,
        max_invalid=1.0,  # prompts that nobody judged are not invalid
        intervals=intervals,
    )
    compared = _compared(judged.pairs, points, by_metric) if by_metric else []
    by_votes, by_scores = [side for side, _ in compared], [by_score for _, by_score in compared]
    return replace(
        row,
        wins=sides.count(WIN),
        ties=sides.count(TIE),
        losses=sides.count(LOSS),
        invalid=None,
        position_bias=judged.position_bias(),
        metric_agreement=same_share(by_votes, by_scores) if compared else None,
        metric_kappa=kappa(by_votes, by_scores) if compared else None,
        metric_prompts=len(compared) or None,
        people=JudgedByPeople(
            judged=num_judged,
            same_answers=sum(pair.same for pair in judged.pairs),
            annotators=len(judged.annotators),
            votes=len(judged.votes),
            stale=judged.stale,
            alpha=judged.alpha(),
        ),
    )


def _compared(
    pairs: Sequence[AnswerPair], points: Sequence[float | None], by_metric: Sequence[float | None]
) -> list[tuple[float, float]]:
    return [
        (_side(value), by_score)
        for pair, value, by_score in zip(pairs, points, by_metric, strict=True)
        if not pair.same and value is not None and by_score is not None
    ]


def _side(points: float) -> float:
    return WIN if points > TIE else LOSS if points < TIE else TIE
