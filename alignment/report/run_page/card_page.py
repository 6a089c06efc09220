"""A reward model's card as text and finished plots for the page."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.records.interval import Interval
from alignment.records.reward_card import Learned, Length, RewardCard
from alignment.report.kit import text
from alignment.report.kit.plots import calibration_curve, histogram
from alignment.report.run_page.run_records import Card
from alignment.report.run_page.run_tables import Row, bounds, whisker_plot

MODEL = "reward model"
CHANCE = 0.5
"""Accuracy of a judge that knows nothing."""
FEW_WORDS = 8
"""How many words for and against an answer the page names."""


def card_view(card: Card) -> Row:
    """The card with its plots and tables, for the template; ``spread`` is the scores' standard deviation."""
    formats = {} if card.record.invariances is None else card.record.invariances.formats
    names = dict.fromkeys(name for scores in formats.values() for name in scores.changes)
    changes = [
        {
            "name": name,
            "by_format": {form: scores.changes[name] for form, scores in formats.items() if name in scores.changes},
        }
        for name in names
    ]
    known = [(MODEL, card.record.accuracy), *((judge.name, judge.accuracy) for judge in card.record.baselines)]
    accuracies = [(name, accuracy, "plain" if index else "trained") for index, (name, accuracy) in enumerate(known)]
    return {
        "stage": card.stage,
        "card": card.record,
        "judges": whisker_plot(accuracies, rule=CHANCE, digits=3),
        "plots": list(plots(card.record)),
        "figures": list(_figures(card.record)),
        "changes": changes,
        "formats": list(dict.fromkeys(form for form, scores in formats.items() if scores.changes)),
        "spread": next((scores.spread for scores in formats.values()), None),
    }


def lead(card: Card) -> str:
    """The card in a sentence or two."""
    accuracy, within = card.record.accuracy, bounds(card.record.accuracy)
    right = f"{card.stage}: the reward model is right on {text.number(accuracy.mean)} of {card.record.num_pairs} pairs"
    others = [f"{judge.name} {text.number(judge.accuracy.mean)}" for judge in card.record.baselines]
    return f"{right}{f' ({within})' if within else ''}{f'; {text.listing(others)}' if others else ''}."


def plots(card: RewardCard) -> Iterator[Row]:
    """The calibration curve and the histogram of margins, if the card has them."""
    if bins := card.calibration.bins:
        caption = "share of pairs that it gets right, by its confidence; dotted: perfect calibration"
        points = [(part.confidence, Interval(mean=part.share, low=part.low, high=part.high)) for part in bins]
        yield {"title": "Calibration", "caption": caption, "svg": calibration_curve(points, title="Calibration")}
    edges, counts = card.margins.edges, card.margins.counts
    if counts and len(edges) == len(counts) + 1:
        caption = "pairs by margin: score of chosen − rejected; below 0 it is wrong"
        yield {"title": "Margins", "caption": caption, "svg": histogram(edges, counts, title="Margins")}


def _figures(card: RewardCard) -> Iterator[tuple[str, str]]:
    for judge in card.baselines:
        if judge.difference is not None:
            yield f"accuracy minus the accuracy of: {judge.name}", _difference(judge.difference)
    calibration = card.calibration
    if calibration.ece is not None and calibration.brier is not None and calibration.log_loss is not None:
        yield "expected calibration error", text.number(calibration.ece, 3)
        yield "Brier score (chance: .25)", text.number(calibration.brier, 3)
        yield "log loss, nats (chance: .693)", text.number(calibration.log_loss, 3)
    yield from _of_length(card.length)
    if card.rule and card.rule.agreement and card.rule.accuracy:
        agreement = f"{text.number(card.rule.agreement.mean)} of the {card.rule.num_pairs} pairs that the rule decides"
        yield "agrees with the rule", f"{agreement}; the rule itself is right on {text.number(card.rule.accuracy.mean)}"
    if means := [subset.accuracy.mean for subset in card.subsets if subset.accuracy]:
        yield "mean over subsets", text.number(sum(means) / len(means), 3)
    if card.learned:
        yield "learned from", _learned(card.learned)
        for words, heading in (
            (card.learned.for_answer, "words that favour an answer (bag of words)"),
            (card.learned.against, "words that count against an answer"),
        ):
            if words:
                yield heading, ", ".join(words[:FEW_WORDS])


def _of_length(length: Length) -> Iterator[tuple[str, str]]:
    if length.prefers_longer is not None and length.longer_is_chosen is not None:
        shares = text.share(length.prefers_longer), text.share(length.longer_is_chosen)
        yield "prefers the longer answer", f"{shares[0]} of pairs; the longer one is better in {shares[1]}"
    if length.correlation is not None:
        yield "correlation of margin and difference in length", text.number(length.correlation)
    if length.accuracy_where_longer is not None and length.accuracy_where_shorter is not None:
        sides = text.number(length.accuracy_where_longer), text.number(length.accuracy_where_shorter)
        yield "right where the better answer is longer, shorter", f"{sides[0]}, {sides[1]}"


def _difference(item: Interval) -> str:
    more = text.signed(item.mean)
    if item.low is None or item.high is None:
        return more
    return f"{more} ({text.signed(item.low)} to {text.signed(item.high)})"


def _learned(learned: Learned) -> str:
    pairs = f"{learned.num_pairs} pairs"
    if not learned.judged_too:
        return f"{pairs}; no judged pair overlaps with them"
    fate = "left out" if learned.left_out else "judged anyway"
    return f"{pairs}; {learned.judged_too} judged pairs overlap with them and were {fate}"
