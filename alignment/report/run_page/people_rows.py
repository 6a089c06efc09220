"""The table of what people judged, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.records.evaluation import Evaluation, JudgedByPeople, JudgedPair
from alignment.records.interval import Interval
from alignment.report.kit import text
from alignment.report.run_page.run_tables import TONES, metric_agreement, metric_prompts

PEOPLE = "people"
"""The kind of judge that this table is for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeopleRow:
    """Two arms that people compared; ``counts`` are wins, ties and losses, ``stale`` the votes on other answers.

    ``averaged`` says over which prompts the win rate is, and ``compared`` on how many the metric was compared.
    """

    arm: str
    against: str
    rate: Interval | None
    at_equal_lengths: Interval | None
    counts: str
    judged: str
    averaged: str
    votes: str
    stale: str
    alpha: str
    bias: str
    metric: str
    compared: str
    verdict: str
    tone: str


def people_rows(evaluation: Evaluation) -> list[PeopleRow]:
    """A row for each pair, if people judged."""
    judge = evaluation.judge
    rows = []
    for pair in judge.pairs if judge is not None and judge.kind == PEOPLE else []:
        people = pair.people
        if people is None:
            continue
        rows.append(
            PeopleRow(
                arm=evaluation.label(pair.arm),
                against=evaluation.label(pair.against),
                rate=pair.win_rate,
                at_equal_lengths=pair.length_controlled,
                counts=f"{pair.wins} / {pair.ties} / {pair.losses}",
                judged=f"{people.judged}" if pair.prompts is None else f"{people.judged} of {pair.prompts}",
                averaged=_averaged(pair, people),
                votes=f"{people.votes} by {people.annotators}",
                stale=f"{people.stale} on other answers" if people.stale else "",
                alpha=text.number(people.alpha),
                bias="–" if pair.position_bias is None else text.signed(pair.position_bias, 2),
                metric=metric_agreement(pair),
                compared=metric_prompts(pair),
                verdict=pair.verdict,
                tone=TONES.get(pair.verdict, "open"),
            )
        )
    return rows


def _averaged(pair: JudgedPair, people: JudgedByPeople) -> str:
    """Over how many prompts the win rate is, if these are more than the judged ones."""
    identical = pair.counted - people.judged
    if pair.win_rate is None or identical <= 0:
        return ""
    return f"win rate over {pair.counted}, {identical} of them with identical answers"
