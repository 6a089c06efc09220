"""What the page shows of a reward model's card, as text and ready-made plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from alignment.records.interval import Interval
from alignment.report.kit import text
from alignment.report.kit.plots import calibration_curve, histogram, scale_axis, scale_of, whisker
from alignment.report.run_page.run_records import RewardCard
from alignment.report.run_page.run_tables import Whisker, WhiskerPlot, bounds

CHANCE = 0.5
"""Accuracy of a judge that knows nothing."""
FEW_WORDS = 8
"""Words of each kind that the page names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A plot as the page shows it."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class CardView:
    """A card with all that is drawn of it; ``figures`` are (words, value)."""

    card: RewardCard
    judges: WhiskerPlot
    plots: list[Figure]
    figures: list[tuple[str, str]]
    formats: list[str]


def card_view(card: RewardCard) -> CardView:
    """The card, drawn."""
    formats = list(dict.fromkeys(form for change in card.changes for form in change.moved))
    return CardView(
        card=card, judges=_judges(card), plots=list(plots(card)), figures=list(_figures(card)), formats=formats
    )


def lead(card: RewardCard) -> str:
    """The card in a sentence or two."""
    told = (
        f"{card.stage}: the reward model is right on {text.number(card.model.accuracy.mean)} of {card.num_pairs} pairs"
    )
    within = bounds(card.model.accuracy)
    others = [f"{judge.name} {text.number(judge.accuracy.mean)}" for judge in card.judges]
    return f"{told}{f' ({within})' if within else ''}{f'; {text.listing(others)}' if others else ''}."


def plots(card: RewardCard) -> Iterator[Figure]:
    """The calibration curve and the margins, as far as the card has them."""
    if card.bins:
        caption = "share of pairs in which it is right, over how sure it is; dotted: as sure as right"
        svg = calibration_curve([(one.confidence, one.share) for one in card.bins], title="Calibration")
        yield Figure(title="Calibration", caption=caption, svg=svg)
    if card.counts:
        caption = "pairs by score of chosen − rejected; left of 0 it is wrong"
        yield Figure(title="Margins", caption=caption, svg=histogram(card.edges, card.counts, title="Margins"))


def _judges(card: RewardCard) -> WhiskerPlot:
    known = (card.model, *card.judges)
    scale = scale_of([judge.accuracy for judge in known], within=(0.0, 1.0), include=CHANCE)
    rows = [
        Whisker(
            label=judge.name,
            svg=whisker(judge.accuracy, scale, tone="trained" if judge is card.model else "plain", rule=CHANCE),
            value=text.number(judge.accuracy.mean, 3),
            bounds=bounds(judge.accuracy),
        )
        for judge in known
    ]
    return WhiskerPlot(rows=rows, axis=scale_axis(scale))


def _figures(card: RewardCard) -> Iterator[tuple[str, str]]:
    scales, length = card.scales, card.length
    for judge in card.judges:
        if judge.difference is not None:
            yield f"more often right than: {judge.name}", _difference(judge.difference)
    if {"ece", "brier", "log_loss"} <= scales.keys():
        yield "expected calibration error", text.number(scales["ece"], 3)
        yield "Brier score (.25 knows nothing)", text.number(scales["brier"], 3)
        yield "log loss, nats (.693 knows nothing)", text.number(scales["log_loss"], 3)
    if "prefers_longer" in length and "longer_is_chosen" in length:
        shares = text.share(length["prefers_longer"]), text.share(length["longer_is_chosen"])
        yield "prefers the longer answer", f"{shares[0]} of pairs; the longer one is the better in {shares[1]}"
    if "correlation" in length:
        yield "correlation of margin and difference in length", text.number(length["correlation"])
    if "accuracy_where_longer" in length and "accuracy_where_shorter" in length:
        sides = text.number(length["accuracy_where_longer"]), text.number(length["accuracy_where_shorter"])
        yield "right where the better answer is longer, shorter", f"{sides[0]}, {sides[1]}"
    if "agreement" in card.rule and "accuracy" in card.rule:
        agreement, accuracy = card.rule["agreement"], card.rule["accuracy"]
        told = f"{text.number(agreement.mean)} of the {card.rule_pairs} pairs that it tells apart"
        yield "agrees with the rule", f"{told}; there the rule is right on {text.number(accuracy.mean)}"
    if card.subset_mean is not None:
        yield "mean over subsets", text.number(card.subset_mean, 3)
    if card.learned:
        yield "learned from", _learned(card)
        for key, words in (("for", "words for an answer, by the bag"), ("against", "words against it")):
            if card.learned[key]:
                yield words, ", ".join(card.learned[key][:FEW_WORDS])


def _difference(item: Interval) -> str:
    more = text.signed(item.mean)
    if item.low is None or item.high is None:
        return more
    return f"{more} ({text.signed(item.low)} to {text.signed(item.high)})"


def _learned(card: RewardCard) -> str:
    learned = card.learned
    told = f"{learned['num_pairs']} pairs"
    if not learned["judged_too"]:
        return f"{told}; none of the pairs judged asks the same"
    fate = "left out" if learned["left_out"] else "judged all the same"
    return f"{told}; {learned['judged_too']} pairs that ask the same were {fate}"
