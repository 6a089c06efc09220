"""The figures of a reward model's report card (docs/design/0016). A margin is the score of the chosen answer minus that
of the rejected one. σ(margin) is the probability, under a Bradley-Terry model, that the chosen answer is the better
one. A tie counts as half right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from alignment.data.records import PreferencePair
from alignment.evaluation.bag_of_words import sigmoid
from alignment.evaluation.statistics import Intervals, grouped_interval
from alignment.records.interval import Interval
from alignment.records.reward_card import (
    Baseline,
    Bin,
    Calibration,
    Length,
    Margins,
    RewardCard,
    RuleAgreement,
    ScoredPair,
    Subset,
    Turn,
)

BINS = 5
"""Bins of calibration, from chance to certainty. Chosen, not tuned: five hundred pairs give a hundred per bin."""
BARS = 20
"""Bars of the histogram of margins, half of them on each side of 0."""
FEW = 10
"""With fewer prompts no interval is given: a bootstrap over so few says too little."""
WORDS, LONGER = "bag of words", "longer answer"
_JUDGES = {WORDS: "a bag of words", LONGER: "the rule 'longer is better'"}
"""The simpler judges, as named in sentences."""
_OUTLIERS = 0.99
"""Share of margins within the edges of the histogram; the outermost bars hold the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A pair with its judgements, chosen answer first. ``scores`` are the model's, ``tokens`` the lengths of prompt and
    answer together. ``words`` is the margin of a bag of words and ``rule`` the rule's score of each answer; None
    without a bag of words or a rule."""

    pair: PreferencePair
    scores: tuple[float, float]
    tokens: tuple[int, int]
    words: float | None = None
    rule: tuple[float, float] | None = None

    @property
    def margin(self) -> float:
        return self.scores[0] - self.scores[1]

    @property
    def longer_by(self) -> int:
        return self.tokens[0] - self.tokens[1]

    @property
    def subset(self) -> str:
        """The subset of a benchmark, or else the task."""
        return self.pair.subset or self.pair.task

    @property
    def prompt(self) -> str:
        """A key that is the same for pairs of the same prompt."""
        return repr(self.pair.messages)

    @property
    def record(self) -> ScoredPair:
        pair = self.pair
        return ScoredPair(
            id=pair.id,
            where=pair.where,
            subset=self.subset,
            messages=[
                Turn(role=message.role, content=message.content, tool_calls=list(message.tool_calls))
                for message in pair.messages
            ],
            chosen=pair.chosen,
            rejected=pair.rejected,
            scores=list(self.scores),
            margin=self.margin,
            tokens=list(self.tokens),
            bag_of_words=self.words,
            rule=None if self.rule is None else list(self.rule),
        )


def interval_over(
    values: Sequence[float], pairs: Sequence[Judged], intervals: Intervals, *, least: float = 0.0
) -> Interval:
    """The mean over pairs of values from ``least`` to 1 with its 95 % interval, without one for fewer than ``FEW``
    prompts. Prompts are resampled, with all their pairs."""
    prompts = [judged.prompt for judged in pairs]
    if len(set(prompts)) < FEW:
        return Interval(mean=float(np.mean(values)))
    return grouped_interval(values, prompts, least=least, most=1.0, samples=intervals.samples, seed=intervals.seed)


def right(margins: Sequence[float]) -> list[float]:
    """1 for each margin above 0, 0 below, .5 for a tie."""
    return [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]


def card_of(pairs: Sequence[Judged], *, intervals: Intervals, num_worst: int) -> RewardCard:
    """All figures of the pairs, of which there must be at least one."""
    return RewardCard(
        num_pairs=len(pairs),
        num_prompts=len({judged.prompt for judged in pairs}),
        accuracy=interval_over(_model(pairs), pairs, intervals),
        baselines=baselines(pairs, intervals),
        subsets=subsets(pairs, intervals),
        calibration=calibration([judged.margin for judged in pairs]),
        margins=histogram([judged.margin for judged in pairs]),
        length=length_bias(pairs),
        rule=rule_agreement(pairs, intervals),
        worst=[judged.record for judged in worst(pairs, num_worst)],
    )


def baselines(pairs: Sequence[Judged], intervals: Intervals) -> list[Baseline]:
    """How often each simpler judge is right, and how much more often the model is right, paired."""
    by_model = _model(pairs)
    judges = []
    for name, by_judge in _simpler(pairs).items():
        more = [model_right - judge_right for model_right, judge_right in zip(by_model, by_judge, strict=True)]
        accuracy = interval_over(by_judge, pairs, intervals)
        difference = interval_over(more, pairs, intervals, least=-1.0)
        judges.append(Baseline(name=name, accuracy=accuracy, difference=difference))
    return judges


def subsets(pairs: Sequence[Judged], intervals: Intervals) -> list[Subset]:
    """Accuracy by subset, in order of appearance; empty for fewer than two subsets."""
    names = list(dict.fromkeys(judged.subset for judged in pairs))
    if len(names) < 2:
        return []
    return [
        Subset(
            name=name or "none",
            num_pairs=len(members),
            accuracy=interval_over(_model(members), members, intervals),
            baselines={judge: float(np.mean(values)) for judge, values in _simpler(members).items()},
        )
        for name in names
        for members in [[judged for judged in pairs if judged.subset == name]]
    ]


def _model(pairs: Sequence[Judged]) -> list[float]:
    return right([judged.margin for judged in pairs])


def _simpler(pairs: Sequence[Judged]) -> dict[str, list[float]]:
    """Which pairs the simpler judges get right, by judge."""
    words = [judged.words for judged in pairs if judged.words is not None]
    by_name = {WORDS: right(words)} if len(words) == len(pairs) else {}
    return {**by_name, LONGER: right([judged.longer_by for judged in pairs])}


def calibration(margins: Sequence[float]) -> Calibration:
    """Whether the model is right as often as it is confident: σ(|margin|) against the share of pairs it gets right.
    Confidence is that in the answer that the model prefers, so that no pair has to be flipped at random. ``ece`` is the
    mean distance of the two over the bins, weighted by their pairs (Naeini et al. 2015). ``brier`` is the mean of (1 −
    σ(margin))² and ``log_loss`` that of −log σ(margin), in nats: .25 and .693 for a model that knows nothing."""
    values = np.asarray(margins, dtype=np.float64)
    confidence = sigmoid(np.abs(values))
    share = np.asarray(right(margins))
    bin_of = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        members = bin_of == number
        if members.any():
            bins.append(_bin(number, confidence[members], share[members]))
    ece = sum(part.num_pairs * abs(part.share - part.confidence) for part in bins) / len(values)
    return Calibration(
        bins=bins,
        ece=float(ece),
        brier=float(((1 - sigmoid(values)) ** 2).mean()),
        log_loss=float(np.logaddexp(0.0, -values).mean()),
    )


def _bin(number: int, confidence: NDArray[np.float64], share: NDArray[np.float64]) -> Bin:
    low, high = wilson(float(share.mean()), len(share))
    return Bin(
        start=0.5 + number / (2 * BINS),
        end=0.5 + (number + 1) / (2 * BINS),
        num_pairs=len(share),
        confidence=float(confidence.mean()),
        share=float(share.mean()),
        low=low,
        high=high,
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` trials, assumed to be independent (Wilson 1927)."""
    z = 1.959964
    middle = share + z * z / (2 * count)
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return (middle - half) / whole, (middle + half) / whole


def histogram(margins: Sequence[float]) -> Margins:
    """Counts of margins between edges around 0; the outermost bars also hold the margins beyond them."""
    values = np.asarray(margins, dtype=np.float64)
    reach = float(np.quantile(np.abs(values), _OUTLIERS)) or 1.0
    edges = np.linspace(-reach, reach, BARS + 1)
    counts, _ = np.histogram(np.clip(values, -reach, reach), edges)
    return Margins(edges=edges.tolist(), counts=counts.tolist(), mean=float(values.mean()), std=float(values.std()))


def length_bias(pairs: Sequence[Judged]) -> Length:
    """Whether the model prefers longer answers: the correlation of margin and difference in length, how often it
    prefers the longer answer, how often that is the chosen one, and the accuracy where the chosen answer is longer and
    where it is shorter. Figures without any pairs are None."""
    different = [judged for judged in pairs if judged.longer_by]
    prefers = [judged.margin * (1 if judged.longer_by > 0 else -1) for judged in different]
    longer = [judged for judged in different if judged.longer_by > 0]
    shorter = [judged for judged in different if judged.longer_by < 0]
    return Length(
        correlation=_correlation([judged.margin for judged in pairs], [judged.longer_by for judged in pairs]),
        prefers_longer=_mean(right(prefers)),
        longer_is_chosen=_mean([float(judged.longer_by > 0) for judged in different]),
        accuracy_where_longer=_mean(_model(longer)),
        accuracy_where_shorter=_mean(_model(shorter)),
    )


def rule_agreement(pairs: Sequence[Judged], intervals: Intervals) -> RuleAgreement | None:
    """How often model and rule prefer the same answer, among pairs whose answers the rule scores differently, and how
    often the rule is right there; None without a rule."""
    with_rule = [(judged, judged.rule[0] - judged.rule[1]) for judged in pairs if judged.rule is not None]
    apart = [(judged, margin) for judged, margin in with_rule if margin]
    if not apart:
        return RuleAgreement() if with_rule else None
    decided = [judged for judged, _ in apart]
    agree = right([judged.margin * margin for judged, margin in apart])
    return RuleAgreement(
        num_pairs=len(apart),
        agreement=interval_over(agree, decided, intervals),
        accuracy=interval_over(right([margin for _, margin in apart]), decided, intervals),
    )


def worst(pairs: Sequence[Judged], count: int) -> list[Judged]:
    wrong = sorted((judged for judged in pairs if judged.margin < 0), key=lambda judged: judged.margin)
    return wrong[:count]


def warnings(card: RewardCard) -> list[str]:
    """What a reader must know before reading the figures, one sentence each."""
    sentences = []
    learned = card.learned
    if learned and learned.judged_too and not learned.left_out:
        sentences.append(
            f"{learned.judged_too} of the {card.num_pairs} pairs overlap with the model's training pairs, so it may "
            f"have memorised the answer."
        )
    if learned and not learned.part_known:
        sentences.append(
            "It is not known exactly on which part of its file the model was trained, so every pair of the file "
            "counts as a training pair."
        )
    for baseline in card.baselines:
        judge, difference = _JUDGES[baseline.name], baseline.difference
        if difference is None or not difference.excludes_zero():
            sentences.append(f"It is not shown to be right more often than {judge}.")
        elif difference.mean < 0:
            sentences.append(f"It is right less often than {judge}.")
    if card.invariances and card.invariances.moved:
        changes = ", ".join(card.invariances.moved)
        sentences.append(f"In float32 its scores change although they should not: {changes}.")
    return sentences


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    if len(left) < 2 or np.std(left) == 0 or np.std(right) == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])
