"""``evaluation.json`` and ``samples.jsonl``: arms compared on held-out prompts (docs/evaluation.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from alignment.core import typed_json
from alignment.core.artifacts import write_lines
from alignment.core.errors import ArtifactError
from alignment.core.typed_json import LEFT_OUT_IF_EMPTY, Label, Name
from alignment.records import ResultFile
from alignment.records.interval import Interval

FILE = "evaluation.json"
SAMPLES = "samples.jsonl"

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no real difference"
"""Verdicts on two arms."""
NOTHING = "nothing can be concluded"
"""The verdict on two arms if too many of the judge's verdicts are invalid."""
LEVEL = 0.05
"""How often a family of comparisons without any true difference may show one."""
FEWEST_PROMPTS = 10
"""With fewer, an interval that resamples prompts is too narrow to rely on."""
TOO_FEW = f"fewer than {FEWEST_PROMPTS} prompts"
"""The verdict on two arms that were compared on too few prompts to say."""


def p_in_short(p: float) -> str:
    """``0.012``: two significant digits, but a p value below ``LEVEL`` never reads as ``LEVEL``."""
    shown = f"{p:.2g}"
    return "0.049" if p < LEVEL <= float(shown) else shown


def adjusted_p_in_words(adjusted_p: float | None) -> str:
    """``, adjusted p 0.012``, to put behind an interval; empty where it is not known."""
    return "" if adjusted_p is None else f", adjusted p {p_in_short(adjusted_p)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric that the recipe asked for: ``Metric(name="brevity", higher_is_better=True)``.

    ``of_answers`` is False for a score that does not read the answers, but what the policy finds likeliest."""

    name: Name
    higher_is_better: bool = True
    of_answers: bool = True

    def direction(self, difference: float) -> str:
        """``better`` or ``worse``: what a real difference of this sign means."""
        return BETTER if (difference > 0) == self.higher_is_better else WORSE


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """One arm; a figure that was not measured is None.

    ``metrics`` are the recipe's, by name. ``greedy_log_ratio`` is in nats per sequence, ``loss`` in nats per token;
    ``kl`` estimates the KL divergence from the reference on sampled answers, in nats per sequence. ``refusals`` and
    ``ended`` are shares of the answers, ``distinct`` is the share of different ones among the first answers to each
    prompt, ``win_rate`` is a share of the points against the reference.
    ``seconds`` is the time that answering took. ``by_turn`` has the metrics of each turn, if prompts have several."""

    name: Name
    label: Label = ""
    metrics: dict[Name, Interval] = field(default_factory=dict)
    words: Interval | None = None
    reward: Interval | None = None
    greedy_log_ratio: Interval | None = None
    kl: Interval | None = None
    win_rate: Interval | None = None
    loss: Interval | None = None
    perplexity: Interval | None = None
    refusals: Interval | None = None
    distinct: float | None = None
    ended: Interval | None = None
    seconds: float | None = None
    by_turn: list[dict[Name, Interval]] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name.removeprefix("stage:"))

    @property
    def all_metrics(self) -> dict[str, Interval]:
        """Everything that was measured of its answers, by name, the recipe's metrics first."""
        others = ((part.name, getattr(self, part.name)) for part in fields(self) if part.name not in _NOT_MEASURED)
        intervals = {name: Interval(mean=value) if isinstance(value, float) else value for name, value in others}
        return {**self.metrics, **{name: value for name, value in intervals.items() if value is not None}}


_NOT_MEASURED = ("name", "label", "metrics", "seconds", "by_turn")
ARM_METRICS = tuple(part.name for part in fields(ArmResult) if part.name not in _NOT_MEASURED)
"""Names that no metric of a recipe can have, because every arm has a figure of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """``arm`` minus ``against`` in a metric, paired by prompt.

    ``low`` and ``high`` bound the 95 % interval of this one difference. ``p`` is the p value of a randomisation test,
    and ``adjusted_p`` allows for the number of comparisons in the family (Holm 1979); older files have neither.
    ``detectable`` is the true difference that four of five such evaluations would find. Example:
    ``Comparison(arm="stage:dpo", against="stage:sft", metric="brevity", difference=0.08, low=0.02, high=0.14)``."""

    arm: Name
    against: Name
    metric: Name = ""
    difference: float
    low: float
    high: float
    p: float | None = None
    adjusted_p: float | None = None
    detectable: float | None = None

    @property
    def interval(self) -> Interval:
        """The difference with its bounds."""
        return Interval(mean=self.difference, low=self.low, high=self.high)

    @property
    def real(self) -> bool:
        """Whether the difference is more than chance among the comparisons of its family. Older files have no p value:
        the interval has to exclude zero."""
        return self.interval.excludes_zero() if self.adjusted_p is None else self.adjusted_p < LEVEL

    @property
    def p_in_words(self) -> str:
        """``, adjusted p 0.012``, to put behind the interval; empty where it is not known."""
        return adjusted_p_in_words(self.adjusted_p)

    def turned(self) -> Comparison:
        """The same difference, seen from the other arm."""
        return replace(
            self, arm=self.against, against=self.arm, difference=-self.difference, low=-self.high, high=-self.low
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedByPeople:
    """How people judged two arms: the number of prompts ``judged``, of ``votes`` and of ``annotators``.

    ``same_answers`` counts prompts to which both arms gave the same answer, so nobody judges them. ``stale`` votes are
    for other answers of the same arms and do not count. ``alpha`` is Krippendorff's α; None if no prompt has two votes,
    or all such votes are the same."""

    judged: int = 0
    same_answers: int = 0
    annotators: int = 0
    votes: int = 0
    stale: int = 0
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedPair:
    """A judge's results for two arms; ``win_rate`` is None if nothing can be concluded.

    ``wins``, ``ties`` and ``losses`` count prompts, ``invalid`` is a share of verdicts. ``length_controlled`` is the
    win rate between answers of equal length; None where length and arm cannot be told apart. ``p`` is the p value of a
    randomisation test against one half, and ``adjusted_p`` allows for the number of judged pairs (Holm 1979); older
    files have neither. ``metric_agreement`` and
    ``metric_kappa`` compare the judge with the primary metric on the ``metric_prompts``: the prompts with different
    answers that both judged. docs/evaluation.md explains the other figures."""

    arm: Name
    against: Name
    prompts: int | None = None
    wins: int
    ties: int
    losses: int
    win_rate: Interval | None = None
    length_controlled: Interval | None = None
    p: float | None = None
    adjusted_p: float | None = None
    verdict: Name = ""
    invalid: float | None = None
    agreement: float | None = None
    position_bias: float | None = None
    metric_agreement: float | None = None
    metric_kappa: float | None = None
    metric_prompts: int | None = None
    people: JudgedByPeople | None = None

    @property
    def counted(self) -> int:
        """The prompts with a valid verdict."""
        return self.wins + self.ties + self.losses

    @property
    def p_in_words(self) -> str:
        """``, adjusted p 0.012``, to put behind the interval; empty where it is not known."""
        return adjusted_p_in_words(self.adjusted_p)

    @property
    def why_nothing(self) -> str:
        """Why nothing can be concluded, in words: too many invalid verdicts, or too few prompts that people judged."""
        if self.people is None:
            return f"{self.invalid or 0:.0%} of the verdicts are invalid"
        judged, remedy = self.people.judged, "evaluate on more held-out prompts"
        different = None if self.prompts is None else self.prompts - self.people.same_answers
        if different is None or different >= FEWEST_PROMPTS:
            why = f"people judged {judged} of {self.prompts} prompts, but {FEWEST_PROMPTS} are needed"
        elif different == 0:
            why = f"all {self.prompts} prompts have identical answers, so there is nothing to judge; {remedy}"
        elif judged < different:
            why = (
                f"people judged {judged} of the {different} prompts with different answers, but {FEWEST_PROMPTS} are "
                f"needed: {remedy}"
            )
        else:
            why = (
                f"people judged all {different} prompts with different answers, so nothing is left to judge, but "
                f"{FEWEST_PROMPTS} are needed: {remedy}"
            )
        return why + self.stale_votes

    @property
    def stale_votes(self) -> str:
        """``; 3 votes are for other answers and do not count``, to put behind a sentence; empty if there are none."""
        stale = 0 if self.people is None else self.people.stale
        return f"; {stale} votes are for other answers and do not count" if stale else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """The judge of pairs of arms, the number of prompts, and the results.

    ``labelled`` has the judge's results for pairs from which people chose an answer. The chosen answers count as the
    arm, so its win rate is the share of pairs on which the judge agrees with people, ties counted as half."""

    kind: Name = ""
    name: Name = "a judge"
    num_prompts: int | None = None
    pairs: list[JudgedPair] = field(default_factory=list)
    labelled: JudgedPair | None = field(default=None, metadata=LEFT_OUT_IF_EMPTY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grading:
    """How a model graded the answers for a ``metric``, on a scale of whole numbers.

    ``num_prompts`` counts the prompts with a grade for every answer of every arm that has the metric; the others do not
    count. ``invalid`` is the share of an arm's replies without a grade. ``left_out`` names the arms that have too many
    of these and so do not get the metric."""

    metric: Name
    model: Name = "a grader"
    lowest: int | None = None
    highest: int | None = None
    num_prompts: int | None = None
    invalid: dict[Name, float] = field(default_factory=dict)
    left_out: list[Name] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(ResultFile):
    """The results of all arms and their comparisons.

    ``primary`` names the metric of ``comparisons``; without metrics there are neither. The comparisons by other metrics
    form a separate family, and so do ``reward_comparisons``, by the scores of the reward model. ``tasks`` maps a task
    to each arm's mean. ``gradings`` are about metrics that a model graded. ``num_scored`` counts the prompts to which a
    metric applies, for metrics that do not apply to all. ``conclusions`` say what an evaluation of this size can show.
    """

    file: ClassVar[str] = FILE
    num_prompts: int | None = None
    metrics: list[Metric] = field(default_factory=list)
    primary: Name | None = None
    arms: list[ArmResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    other_comparisons: list[Comparison] = field(default_factory=list)
    reward_comparisons: list[Comparison] = field(default_factory=list)
    tasks: dict[Name, dict[Name, float]] = field(default_factory=dict)
    judge: Judge | None = None
    gradings: list[Grading] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)
    num_scored: dict[Name, int] = field(default_factory=dict, metadata=LEFT_OUT_IF_EMPTY)
    conclusions: list[str] = field(default_factory=list)
    version: int = 2

    def label(self, name: str) -> str:
        """The label of the arm ``name``."""
        return next((arm.label for arm in self.arms if arm.name == name), name.removeprefix("stage:"))

    def arm(self, name: str) -> ArmResult | None:
        """The arm of this name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def primary_metric(self) -> Metric | None:
        """The metric by which arms are compared."""
        return next((metric for metric in self.metrics if metric.name == self.primary), None)

    def primary_of(self, arm: ArmResult) -> Interval | None:
        """An arm's mean of the primary metric."""
        return None if self.primary is None else arm.metrics.get(self.primary)

    @property
    def num_compared(self) -> int | None:
        """The prompts on which arms are compared by the primary metric: all, or those with a score in every arm."""
        return self._num_compared_by(self.primary)

    def _num_compared_by(self, metric: str | None) -> int | None:
        grading = next((grading for grading in self.gradings if grading.metric == metric), None)
        num_scored = self.num_scored.get(metric or "") if grading is None else grading.num_prompts
        return self.num_prompts if num_scored is None else num_scored

    def verdict(self, comparison: Comparison) -> str:
        """On the first arm of a comparison: ``better``, ``worse``, ``no real difference`` or ``TOO_FEW``."""
        name = comparison.metric or self.primary
        num_prompts = self._num_compared_by(name)
        if num_prompts is not None and num_prompts < FEWEST_PROMPTS:
            return TOO_FEW
        if not comparison.real:
            return NO_DIFFERENCE
        metric = next((metric for metric in self.metrics if metric.name == name), Metric(name=""))
        return metric.direction(comparison.difference)

    def is_real(self, comparison: Comparison) -> bool:
        """Whether the difference is more than chance, and was measured on enough prompts to say so."""
        return self.verdict(comparison) in (BETTER, WORSE)


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnAnswer:
    """An arm's first answer in one turn, the ``further`` ones, and the turn's score by each metric."""

    text: str = ""
    further: list[str] = field(default_factory=list)
    scores: dict[Name, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleAnswer:
    """An arm's first answer to one prompt, the ``further`` ones, and the prompt's score by each metric.

    ``turns`` are all turns of a prompt that has several, the first one too; its scores are means over them."""

    text: str = ""
    further: list[str] = field(default_factory=list)
    scores: dict[Name, float] = field(default_factory=dict)
    turns: list[TurnAnswer] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A held-out prompt with every arm's answer, by the arm's name; ``messages`` are turns in the form that chat
    templates take. ``later_turns`` are what the user says next, ``later_references`` the reference answers to that.
    ``choices`` and ``tools`` are those of the row."""

    id: Name = ""
    task: Name = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    reference: str = ""
    later_turns: list[str] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)
    later_references: list[str] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)
    choices: list[str] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)
    tools: list[dict[str, Any]] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)
    answers: dict[Name, SampleAnswer] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """A key that identifies the prompt in any evaluation; ids do not, since rows may lack one and files may share
        them."""
        beside = [{"choices": self.choices, "tools": self.tools}] if self.choices or self.tools else []
        return json.dumps([self.id, self.messages, *self.later_turns, *beside], sort_keys=True)


def write_samples(folder: Path, samples: list[Sample]) -> None:
    """Writes ``SAMPLES`` into an artifact's folder."""
    write_lines(folder / SAMPLES, map(typed_json.to_json, samples))


def read_samples(artifact: Path) -> Iterator[Sample]:
    """The samples of an artifact; empty if it has none. Raises ArtifactError: a line is not JSON."""
    file = artifact / SAMPLES
    try:
        yield from typed_json.lines(file, Sample)
    except ValueError as error:
        raise ArtifactError(
            f"unreadable: {error}", where=str(file), remedy=f"delete {artifact} to remake it"
        ) from error
