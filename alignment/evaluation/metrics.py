"""The metrics of an evaluation as its recipe names them, for driver and worker. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignment.config.did_you_mean import suggestion
from alignment.config.faults import Fault
from alignment.config.scoring import MetricConfig
from alignment.config.sweep import PRIMARY
from alignment.records.evaluation import ARM_METRICS, Metric


def recorded(metrics: Sequence[MetricConfig]) -> list[Metric]:
    """The metrics as ``evaluation.json`` lists them."""
    return [Metric(name=metric.name, higher_is_better=metric.higher_is_better) for metric in metrics]


def primary_name(metrics: Sequence[MetricConfig], primary: str | None) -> str | None:
    """The name of the metric that arms are compared by: ``primary``, else the first; None without metrics."""
    return primary or (metrics[0].name if metrics else None)


def faults(metrics: Sequence[MetricConfig], primary: str | None, where: str) -> Iterator[Fault]:
    """Faults in the names of metrics; their sources are checked like those of all scorers."""
    names = [metric.name for metric in metrics]
    for number, name in enumerate(names):
        if message := _wrong_name(name, names[:number]):
            yield Fault(where=f"{where}.metrics[{number}].name", message=message)
    if primary is not None and primary not in names:
        known = suggestion(primary, names) if names else "there are no metrics; add one, or write null"
        yield Fault(where=f"{where}.primary", message=f"no metric '{primary}'; {known}")


def _wrong_name(name: str, before: Sequence[str]) -> str:
    if not name:
        return "missing; write a name, such as brevity"
    if name in before:
        return f"{name!r} is used twice; give each metric its own name"
    if name == PRIMARY or name in ARM_METRICS:
        return f"{name!r} is reserved; choose another name"
    return ""
