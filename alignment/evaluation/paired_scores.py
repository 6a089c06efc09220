"""Metrics by name, names of arms, and scores of two arms on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.config.evaluating import AnswersConfig
from alignment.config.faults import Fault, suggestion, unread_notes
from alignment.config.scoring import MAJORITY, MetricConfig, pass_size
from alignment.config.sweep import PRIMARY
from alignment.records.evaluation import ARM_METRICS, Metric, read_samples
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
