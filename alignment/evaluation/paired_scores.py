"""Metrics by name, names of arms, scores of two arms on the same prompts, and gates on their difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.config.evaluating import AnswersConfig, GateConfig
from alignment.config.faults import Fault, suggestion, unread_notes
from alignment.config.scoring import MAJORITY, MetricConfig, pass_size
from alignment.config.sweep import PRIMARY
from alignment.records.evaluation import (
    ARM_METRICS,
    BETTER,
    FEWEST_PROMPTS,
    Comparison,
    Evaluation,
    Metric,
    adjusted_p_in_words,
    read_samples,
)
from alignment.records.interval import Interval


def recorded(metrics: Sequence[MetricConfig]) -> list[Metric]:
    return [
        Metric(name=metric.name, higher_is_better=metric.higher_is_better, of_answers=metric.source != "choice")
        for metric in metrics
    ]


def primary_name(metrics: Sequence[MetricConfig], primary: str | None) -> str | None:
    """The name of the metric that arms are compared by: ``primary``, else the first; None without metrics."""
    return primary or (metrics[0].name if metrics else None)


def faults(metrics: Sequence[MetricConfig], primary: str | None, answers: AnswersConfig, where: str) -> Iterator[Fault]:
    """Faults in the names and aggregates of metrics; their sources are checked like those of all scorers."""
    if answers.per_prompt > 1 and answers.temperature == 0.0:
        message = f"{answers.per_prompt} greedy answers to a prompt are all the same; set temperature, such as 0.7"
        yield Fault(where=f"{where}.answers.temperature", message=message)
    for number, metric in enumerate(metrics):
        if message := _wrong_aggregate(metric, answers.per_prompt):
            yield Fault(where=f"{where}.metrics[{number}].aggregate", message=message)
        elif pass_size(metric.aggregate) is None:
            reader = "only the aggregate pass@K"
            yield from unread_notes(metric, MetricConfig(), ("passing_score",), f"{where}.metrics[{number}]", reader)
    names = [metric.name for metric in metrics]
    for number, name in enumerate(names):
        if message := _wrong_name(name, names[:number]):
            yield Fault(where=f"{where}.metrics[{number}].name", message=message)
    if primary is not None and primary not in names:
        known = suggestion(primary, names) if names else "there are no metrics; add one, or set null"
        yield Fault(where=f"{where}.primary", message=f"no metric '{primary}'; {known}")


def _wrong_aggregate(metric: MetricConfig, per_prompt: int) -> str:
    size = pass_size(metric.aggregate)
    if size is not None and size > per_prompt:
        return f"{metric.aggregate!r} needs at least {size} answers per prompt; set answers.per_prompt"
    if size is not None and not metric.higher_is_better:
        return f"{metric.aggregate!r} counts high scores as correct, but for this metric lower is better; use 'mean'"
    if metric.aggregate == MAJORITY and metric.source != "exact_answer":
        return "'majority' compares final answers, which only the source exact_answer has; use 'mean'"
    if metric.aggregate == MAJORITY and per_prompt == 1:
        return "'majority' needs several answers per prompt; set answers.per_prompt"
    return ""


def _wrong_name(name: str, before: Sequence[str]) -> str:
    if not name:
        return "missing; write a name, such as brevity"
    if name in before:
        return f"{name!r} is used twice; give each metric its own name"
    if name == PRIMARY or name in ARM_METRICS:
        return f"{name!r} is reserved; choose another name"
    return ""


def labels(arms: Sequence[str]) -> dict[str, str]:
    """A unique label for each arm: ``stage:dpo`` → ``dpo``, ``path:/models/tiny`` → ``tiny``."""
    short = {
        arm: Path(arm.removeprefix("path:")).name if arm.startswith("path:") else arm.removeprefix("stage:")
        for arm in arms
    }
    taken = list(short.values())
    return {arm: label if taken.count(label) == 1 else arm for arm, label in short.items()}


SAMPLES = 2000
SEED = 0


def scores(artifact: Path, arm: str) -> dict[str, dict[str, float]]:
    """Every score of an arm's answers, by metric and by prompt."""
    by_metric: dict[str, dict[str, float]] = {}
    for sample in read_samples(artifact):
        answer = sample.answers.get(arm)
        for metric, score in answer.scores.items() if answer is not None else ():
            by_metric.setdefault(metric, {})[sample.prompt] = score
    return by_metric


def prompts(artifact: Path) -> set[str]:
    return {sample.prompt for sample in read_samples(artifact)}


def in_both(scores: dict[str, float], other_scores: dict[str, float]) -> tuple[dict[str, float], dict[str, float], int]:
    """The scores on prompts that both have, and how many prompts only one has."""
    both = [prompt for prompt in scores if prompt in other_scores]
    only_one = len(scores.keys() ^ other_scores.keys())
    return {prompt: scores[prompt] for prompt in both}, {prompt: other_scores[prompt] for prompt in both}, only_one


def difference(scores: dict[str, float], other_scores: dict[str, float]) -> Interval | None:
    """The mean of ``scores`` minus ``other_scores`` with its 95 % interval; None without scores on the same prompts."""
    from alignment.evaluation.statistics import Intervals  # NumPy, which a plan does without

    if differences(scores, other_scores) is None:
        return None
    intervals = Intervals(samples=SAMPLES, seed=SEED)
    return intervals.of_difference(list(scores.values()), [other_scores[prompt] for prompt in scores])


def differences(scores: dict[str, float], other_scores: dict[str, float]) -> list[float] | None:
    """``scores`` minus ``other_scores`` on each prompt; None without scores on the same prompts."""
    if not scores or scores.keys() != other_scores.keys():
        return None
    return [scores[prompt] - other_scores[prompt] for prompt in scores]


def corrected_p_values(series: Sequence[Sequence[float]]) -> list[float]:
    """The p value of each series of differences, corrected for their number (``adjusted_p_values``)."""
    from alignment.evaluation.statistics import adjusted_p_values  # NumPy

    return adjusted_p_values(series, seed=SEED)[1]


def p_values_among(series: Sequence[Sequence[float]], *, comparisons: int) -> list[float]:
    """The p value of each series of differences, corrected for so many ``comparisons`` that might have been made
    (Bonferroni)."""
    from alignment.evaluation.statistics import p_values_of  # NumPy

    return [min(1.0, p * comparisons) for p in p_values_of(series, seed=SEED, comparisons=comparisons)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOutcome:
    """A gate and what was measured. ``compared`` names the difference, such as ``dpo − sft in total``. ``gain`` is None
    if it is not known; ``why_unknown`` then says why. ``is_better``: the evaluation calls the arm better, by the p
    value ``adjusted_p``."""

    compared: str
    required: float
    gain: Interval | None
    why_unknown: str = ""
    is_better: bool = False
    adjusted_p: float | None = None

    @property
    def met(self) -> bool:
        """Whether the whole interval lies above what is required, and nothing says that it may do so by chance."""
        return self._is_above and not self._why_by_chance

    @property
    def more_prompts_may_help(self) -> bool:
        """Whether the gate is not met only because there are too few prompts to say."""
        return not self.met and self.gain is not None and self.gain.mean > self.required

    @property
    def _is_above(self) -> bool:
        return self.gain is not None and self.gain.bounds is not None and self.gain.bounds[0] > self.required

    @property
    def _why_by_chance(self) -> str:
        """Why the interval is not enough, in words; empty if it is."""
        if self.is_better or self.gain is None:
            return ""
        if self.required >= 0.0:
            return f"the evaluation does not call the difference real{adjusted_p_in_words(self.adjusted_p)}"
        if self.gain.low == self.gain.high:
            return "all prompts have the same difference, so the interval says nothing about others"
        return ""

    def in_words(self) -> str:
        """``dpo − sft in total: −1.000 (−1.000 to −1.000), required: the whole interval above −0.01``."""
        if self.gain is None or self.gain.bounds is None:
            return f"{self.compared}: not known, because {self.why_unknown}"
        low, high = (_signed(bound, ".3f") for bound in self.gain.bounds)
        why_not = f", but {self._why_by_chance}" if self._is_above and self._why_by_chance else ""
        measured = f"{_signed(self.gain.mean, '.3f')} ({low} to {high})"
        return f"{self.compared}: {measured}, required: {above(self.required)}{why_not}"


def outcomes(gates: Sequence[GateConfig], evaluation: Evaluation, artifact: Path) -> list[GateOutcome]:
    """The outcome of each gate, in order. ``artifact`` is the folder of the evaluation's result. Raises ValueError: a
    line of its samples is not JSON."""
    comparisons = [*evaluation.comparisons, *evaluation.other_comparisons]
    return [_outcome(gate, evaluation, artifact, comparisons) for gate in gates]


def compared(arm: str, against: str, metric: str, *, higher_is_better: bool) -> str:
    """The difference that a gate requires to be above a number: ``dpo − sft in total``. ``arm`` and ``against`` are
    labels. If less of the metric is better, the sides change places."""
    first, second = (arm, against) if higher_is_better else (against, arm)
    return f"{first} − {second} in {metric}{'' if higher_is_better else ' (less is better)'}"


def above(required: float) -> str:
    """What a gate requires of the interval, in words."""
    return f"the whole interval above {_signed(required, 'g')}"


def _outcome(
    gate: GateConfig, evaluation: Evaluation, artifact: Path, comparisons: Sequence[Comparison]
) -> GateOutcome:
    name = gate.metric or evaluation.primary or ""
    higher_is_better = next((metric.higher_is_better for metric in evaluation.metrics if metric.name == name), True)
    arm, against = (scores(artifact, side).get(name, {}) for side in (gate.arm, gate.against))
    why_unknown, gain = _why_unknown(arm, against), None
    if not why_unknown:
        gain = difference(arm, against) if higher_is_better else difference(against, arm)
    of_arm = [item if item.arm == gate.arm else item.turned() for item in comparisons]
    wanted = (name, gate.arm, gate.against)
    own = next((item for item in of_arm if (item.metric or evaluation.primary, item.arm, item.against) == wanted), None)
    if own is None and not why_unknown:
        own = _compared_alone(gate, name, arm, against)
    labels = evaluation.label(gate.arm), evaluation.label(gate.against)
    return GateOutcome(
        compared=compared(*labels, name, higher_is_better=higher_is_better),
        required=gate.min_difference,
        gain=gain,
        why_unknown=why_unknown,
        is_better=own is not None and evaluation.verdict(own) == BETTER,
        adjusted_p=None if own is None else own.adjusted_p,
    )


def _compared_alone(gate: GateConfig, metric: str, arm: dict[str, float], against: dict[str, float]) -> Comparison:
    """The difference of two arms that the evaluation does not list, as a family of its own."""
    interval = difference(arm, against)
    assert interval is not None, "both have scores on the same prompts"
    low, high = interval.bounds or (interval.mean, interval.mean)
    (adjusted_p,) = corrected_p_values([differences(arm, against) or []])
    return Comparison(
        arm=gate.arm,
        against=gate.against,
        metric=metric,
        difference=interval.mean,
        low=low,
        high=high,
        adjusted_p=adjusted_p,
    )


def _why_unknown(arm: dict[str, float], against: dict[str, float]) -> str:
    both = len(arm.keys() & against.keys())
    if both < FEWEST_PROMPTS:
        prompts = "1 prompt has a score" if both == 1 else f"{both or 'no'} different prompts have a score"
        return f"{prompts} of both arms, and a gate needs at least {FEWEST_PROMPTS}"
    if only_one := len(arm.keys() ^ against.keys()):
        return f"{'1 prompt has' if only_one == 1 else f'{only_one} prompts have'} a score of only one of these arms"
    return ""


def _signed(value: float, form: str) -> str:
    text = format(value, form)
    return text.replace("-", "−") if float(text) < 0 else f"+{text}" if float(text) > 0 else text.removeprefix("-")
