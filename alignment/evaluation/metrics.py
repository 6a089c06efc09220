"""The metrics of an evaluation as its recipe names them, for driver and worker. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.config.did_you_mean import suggestion
from alignment.config.evaluating import AnswersConfig
from alignment.config.faults import Fault, unread_notes
from alignment.config.scoring import MAJORITY, MetricConfig, pass_size
from alignment.config.sweep import PRIMARY
from alignment.records.evaluation import ARM_METRICS, Metric


def recorded(metrics: Sequence[MetricConfig]) -> list[Metric]:
    """The metrics as ``evaluation.json`` lists them."""
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
