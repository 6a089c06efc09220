"""Tables and curves of a run for pandas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.core.errors import ConfigError
from alignment.records.evaluation import Comparison, Evaluation, Sample
from alignment.report.run_page.curves import points_of
from alignment.stages.registry import curves

if TYPE_CHECKING:
    import pandas


def of_arms(evaluations: Mapping[str, Evaluation]) -> pandas.DataFrame:
    """A row for each arm and metric."""
    columns = ("evaluation", "arm", "metric", "mean", "low", "high")
    rows = (
        (stage, arm.label, metric, value.mean, value.low, value.high)
        for stage, evaluation in evaluations.items()
        for arm in evaluation.arms
        for metric, value in arm.all_metrics.items()
    )
    return data_frame(columns, (dict(zip(columns, row, strict=True)) for row in rows))


def of_differences(evaluations: Mapping[str, Evaluation]) -> pandas.DataFrame:
    """A row for each comparison of two arms."""
    numbers = ("difference", "low", "high", "p", "adjusted_p")
    rows = [
        {
            "evaluation": stage,
            "arm": evaluation.label(comparison.arm),
            "against": evaluation.label(comparison.against),
            "metric": metric,
            **{name: getattr(comparison, name) for name in numbers},
            "verdict": evaluation.verdict(comparison),
        }
        for stage, evaluation in evaluations.items()
        for metric, comparison in _comparisons(evaluation)
    ]
    return data_frame(("evaluation", "arm", "against", "metric", *numbers, "verdict"), rows)


def _comparisons(evaluation: Evaluation) -> Iterator[tuple[str, Comparison]]:
    for comparison in evaluation.comparisons:
        yield comparison.metric or evaluation.primary or "", comparison
    for comparison in evaluation.other_comparisons:
        yield comparison.metric, comparison
    for comparison in evaluation.reward_comparisons:
        yield comparison.metric or "reward", comparison


def of_answers(samples: Sequence[Sample]) -> pandas.DataFrame:
    """A row for each prompt and arm. A metric that is called like another column has ``score/`` before its name."""
    columns = ("id", "task", "prompt", "arm", "answer")
    rows = [
        {
            "id": sample.id,
            "task": sample.task,
            "prompt": sample.messages[-1].get("content", "") if sample.messages else "",
            "arm": arm.removeprefix("stage:"),
            "answer": answer.text,
            **{f"score/{name}" if name in columns else name: score for name, score in answer.scores.items()},
        }
        for sample in samples
        for arm, answer in sample.answers.items()
    ]
    return data_frame(with_others(columns, rows), rows)


def with_others(first: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ``first`` columns, then the others in the order in which rows have them."""
    return list(dict.fromkeys([*first, *(name for row in rows for name in row)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line of a chart: ``Series(title="Loss", unit="", key="loss", label="", over="step", points=[(1.0, 2.31)])``.

    ``key`` is the metric's name in metrics.jsonl. ``points`` are (x, y) pairs; x is the step, or the square root of the
    metric ``over``. y is None where the logged value is not finite.
    """

    title: str
    unit: str
    key: str
    label: str
    over: str
    points: list[tuple[float, float | None]]


def series_of(kind: str, settings: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[Series]:
    """The series of a stage of this kind with these settings; a figure that was not logged has none."""
    return [
        Series(title=chart.title, unit=chart.unit, key=key, label=label, over=chart.over or "step", points=points)
        for chart in curves(kind, settings)
        for key, label in zip(chart.keys, chart.labels, strict=True)
        if (points := points_of(steps, key, chart.over))
    ]


def data_frame(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """A DataFrame with these columns in this order, also without rows; a row may lack a column. Raises ConfigError:
    pandas is not installed."""
    try:
        import pandas
    except ImportError:
        remedy = "pip install 'alignment-pipeline[pandas]'"
        raise ConfigError("tables need pandas, which is not installed here", remedy=remedy) from None
    return pandas.DataFrame(list(rows), columns=list(columns))
