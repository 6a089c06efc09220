"""What can and cannot be concluded from an evaluation of this size, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignment.evaluation.pairwise import TIE
from alignment.records.evaluation import (
    BETTER,
    FEWEST_PROMPTS,
    LEVEL,
    NO_DIFFERENCE,
    NOTHING,
    TOO_FEW,
    WORSE,
    Comparison,
    Judge,
    JudgedPair,
    Metric,
)


def conclusions(
    num_prompts: int,
    metric: Metric | None,
    comparisons: Sequence[Comparison],
    judge: Judge | None,
    labels: Mapping[str, str],
) -> list[str]:
    """Sentences: which arms differ in the primary ``metric``, how large a difference this evaluation would miss, and
    what the judge found, if there is one. Without a metric there are no comparisons. ``num_prompts`` are those that
    have a score."""
    sentences = []
    if metric is None and judge is None:
        sentences = [f"{num_prompts} prompts, but no metric and no judge, so no arm is called better than another."]
    if metric is not None and comparisons and num_prompts < FEWEST_PROMPTS:
        sentences = [f"{num_prompts} prompts, by {metric.name}: {TOO_FEW}, so no difference can be shown."]
    elif metric is not None and comparisons:
        sentences = [
            _differences(num_prompts, metric, comparisons, labels),
            _lost_by_correction(comparisons, labels),
            _limit(metric, comparisons),
        ]
    if judge is not None:
        sentences.append(_judged(judge, labels))
    return [sentence for sentence in sentences if sentence]


def _differences(num_prompts: int, metric: Metric, comparisons: Sequence[Comparison], labels: Mapping[str, str]) -> str:
    real, not_shown = [], []
    for comparison in comparisons:
        arm, against = labels[comparison.arm], labels[comparison.against]
        if comparison.real:
            real.append(f"{arm} is {metric.direction(comparison.difference)} than {against}")
        else:
            not_shown.append(f"{arm} and {against}")
    parts = [", ".join(real)] if real else []
    parts += [f"{', '.join(not_shown)} cannot be told apart"] if not_shown else []
    return f"{num_prompts} prompts, by {metric.name}: {'; '.join(parts)}."


def _lost_by_correction(comparisons: Sequence[Comparison], labels: Mapping[str, str]) -> str:
    """On pairs whose interval excludes zero, but which are not shown to differ."""
    pairs = [pair for pair in comparisons if pair.interval.excludes_zero() and not pair.real]
    if not pairs:
        return ""
    named = ", ".join(f"{labels[pair.arm]} and {labels[pair.against]}" for pair in pairs)
    alone = all(pair.p is not None and pair.p >= LEVEL for pair in pairs)
    judged = "by a randomisation test" if alone else f"among {len(comparisons)} comparisons"
    return f"The interval of {named} excludes zero, but {judged} the difference may be due to chance."


def _limit(metric: Metric, comparisons: Sequence[Comparison]) -> str:
    """From the pairs without a real difference, or else from all; a pair without any spread is skipped."""
    pairs = [comparison for comparison in comparisons if not comparison.real] or comparisons
    sizes = [comparison.detectable for comparison in pairs if comparison.detectable]
    if not sizes:
        return ""
    low, high = _difference(min(sizes)), _difference(max(sizes))
    size = low if low == high else f"{low} to {high} (by pair)"
    return (
        f"A true difference in {metric.name} below about {size} would be missed more than one time in five with "
        f"this number of prompts."
    )


def _difference(size: float) -> str:
    """Two decimals; a smaller one has two significant digits, because "0.00" would say that nothing is missed."""
    return f"{size:.2f}" if size >= 0.01 else f"{size:.2g}"


def _judged(judge: Judge, labels: Mapping[str, str]) -> str:
    parts = []
    for pair in judge.pairs:
        arm, against = labels[pair.arm], labels[pair.against]
        if pair.win_rate is None:
            parts.append(f"{NOTHING} about {arm} and {against} ({pair.why_nothing})")
        else:
            low, high = pair.win_rate.bounds or (pair.win_rate.mean, pair.win_rate.mean)
            parts.append(
                f"{arm} wins {pair.win_rate.mean:.2f} against {against} ({low:.2f} to {high:.2f}{pair.p_in_words}), "
                f"{pair.verdict}"
                f"{_because_of_length(pair)}{votes_in_words(pair)}"
            )
    # Of the votes of people, each pair says how many prompts it has.
    on = "" if any(pair.people for pair in judge.pairs) else f" on {judge.num_prompts} prompts"
    return f"By {judge.name}{on}, ties counted as half a win: {'; '.join(parts)}."


def votes_in_words(pair: JudgedPair) -> str:
    """Over which prompts a win rate of votes is, and whether people agree, in brackets; empty for another judge."""
    people = pair.people
    if people is None:
        return ""
    over = f"over {pair.counted} of {pair.prompts} prompts"
    if identical := pair.counted - people.judged:
        over += f": {people.judged} judged, {identical} with identical answers;"
    else:
        over += ","
    agreement = "" if people.alpha is None else f", Krippendorff's α {people.alpha:.2f}"
    return f" ({over} {people.votes} votes, annotators: {people.annotators}{agreement}{pair.stale_votes})"


def metric_in_words(pair: JudgedPair, metric: str) -> str:
    """How often the metric prefers the same arm as the judge, to put behind a sentence; empty if unknown."""
    if pair.metric_agreement is None or pair.metric_prompts is None:
        return ""
    chance = "" if pair.metric_kappa is None else f" (κ {pair.metric_kappa:.2f})"
    return (
        f"; {metric} prefers the same arm on {pair.metric_agreement:.0%} of {pair.metric_prompts} prompts with "
        f"different answers{chance}"
    )


def _because_of_length(pair: JudgedPair) -> str:
    """Said where a difference is real as it stands, but not between answers of equal length."""
    rate = pair.length_controlled
    if rate is None or rate.bounds is None or pair.verdict not in (BETTER, WORSE):
        return ""
    low, high = rate.bounds
    if (low > TIE) if pair.verdict == BETTER else (high < TIE):
        return ""
    return f", but at equal lengths {rate.mean:.2f} ({low:.2f} to {high:.2f}), {NO_DIFFERENCE}"
