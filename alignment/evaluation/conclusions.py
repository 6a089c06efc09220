"""What judgements, grades and labelled pairs show, and where two kinds of judgement contradict each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from alignment.data.records import PreferencePair
from alignment.evaluation.verdicts import TIE
from alignment.records.evaluation import (
    BETTER,
    FEWEST_PROMPTS,
    LEVEL,
    NO_DIFFERENCE,
    NOTHING,
    TOO_FEW,
    WORSE,
    Comparison,
    Evaluation,
    Grading,
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


def grade_conclusions(gradings: Sequence[Grading], num_prompts: int, labels: Mapping[str, str]) -> list[str]:
    """Sentences about arms that a metric leaves out, and about prompts that do not count; ``labels`` are of arms."""
    sentences = []
    for grading in gradings:
        if grading.left_out:
            arms = ", ".join(f"{labels[arm]} ({grading.invalid[arm]:.0%})" for arm in grading.left_out)
            sentences.append(
                f"By {grading.metric}, {NOTHING} about {arms}: that share of the replies of {grading.model} has no "
                "grade, or no prompt has a grade in every arm."
            )
        counted = grading.num_prompts or 0
        if 0 < counted < num_prompts:
            sentences.append(
                f"{grading.metric} covers {counted} of {num_prompts} prompts; on the others a reply of "
                f"{grading.model} has no grade."
            )
    return sentences


def coverage_conclusions(num_scored: Mapping[str, int], num_prompts: int) -> list[str]:
    return [
        f"{metric} covers {count} of {num_prompts} prompts; on the others it has no value for an answer of an arm."
        if count
        else f"By {metric}, {NOTHING}: on every prompt it has no value for an answer of an arm."
        for metric, count in num_scored.items()
    ]


CHOSEN, REJECTED = "chosen", "rejected"
"""What the two sides are called where arms stand otherwise."""


def one_of_each_prompt(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The first pair of each prompt; pairs of one prompt are no independent trials of a judge."""
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        turns = [turn.as_dict() for turn in pair.messages]
        first.setdefault(json.dumps([turns, pair.tools], sort_keys=True, default=str), pair)
    return list(first.values())


def verdict_on_judge(pair: JudgedPair) -> str:
    """The judge's agreement with people, in a few words."""
    if pair.win_rate is None or pair.verdict == TOO_FEW:
        return pair.verdict
    if pair.verdict == BETTER:
        return "agrees with people"
    return "contradicts people" if pair.verdict == WORSE else "chance may agree as often"


def labelled_conclusions(judge: Judge | None) -> list[str]:
    """A sentence on how often the judge agrees with people, and on what follows if chance would as often."""
    pair = None if judge is None else judge.labelled
    if judge is None or pair is None:
        return []
    if pair.win_rate is None:
        return [
            f"Nothing can be concluded about {judge.name} as a judge: {pair.invalid or 0:.0%} of its verdicts on "
            f"{pair.prompts} labelled pairs are invalid."
        ]
    low, high = pair.win_rate.bounds or (TIE, TIE)
    agreement = (
        f"{judge.name} agrees with people on {pair.win_rate.mean:.0%} of {pair.counted} pairs ({low:.0%} to "
        f"{high:.0%}), ties counted as half"
    )
    if pair.verdict == TOO_FEW:
        return [f"{agreement}, but these are too few to distinguish it from chance."]
    if pair.verdict == BETTER:
        return [f"{agreement}; chance gives 50%."]
    if pair.verdict == WORSE:
        return [f"{agreement}, less often than chance: its win rates say nothing about what people prefer."]
    return [f"{agreement}, which cannot be distinguished from chance: its win rates say nothing."]


def contradictions(evaluation: Evaluation) -> list[str]:
    """A sentence for each pair of arms that really differs in the primary metric, but the other way round by the
    judge's win rate or the reward model's scores, with a difference that is real as well."""
    sentences = []
    for item in filter(evaluation.is_real, evaluation.comparisons):
        gain = item if evaluation.verdict(item) == BETTER else item.turned()
        if others := " and ".join(_contradicting(evaluation, gain.arm, gain.against)):
            better, worse = evaluation.label(gain.arm), evaluation.label(gain.against)
            sentences.append(f"By {evaluation.primary}, {better} is better than {worse}, but {others}.")
    return sentences


def _contradicting(evaluation: Evaluation, better: str, worse: str) -> Iterator[str]:
    judge = evaluation.judge or Judge()
    for pair in judge.pairs:
        preferred = {BETTER: pair.arm, WORSE: pair.against}.get(pair.verdict)
        if pair.win_rate is not None and preferred == worse and {pair.arm, pair.against} == {better, worse}:
            rate = pair.win_rate.mean if pair.arm == worse else 1 - pair.win_rate.mean
            yield f"{judge.name} prefers {evaluation.label(worse)} (win rate {rate:.2f})"
    for item in evaluation.reward_comparisons:
        gain = item if item.arm == worse else item.turned()
        if (gain.arm, gain.against) == (worse, better) and evaluation.is_real(gain) and gain.difference > 0:
            yield f"the reward model scores {evaluation.label(worse)} higher ({gain.difference:+.3f})"
