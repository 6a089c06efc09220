"""A run's records as DataFrames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignment.core.data_frames import data_frame
from alignment.records.evaluation import Comparison, Evaluation, Sample
from alignment.records.run import StageEntry
from alignment.report.comparison_page.setting_rows import flat

if TYPE_CHECKING:
    import pandas


def of_steps(steps: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """A row for each logged step."""
    return data_frame(_columns(["step"], steps), steps)


def of_stages(stages: Sequence[tuple[str, StageEntry, Mapping[str, float]]]) -> pandas.DataFrame:
    """A row for each stage, from its name, entry and usage."""
    rows = [
        {
            "stage": name,
            "kind": entry.kind,
            "state": entry.state,
            "reason": entry.reason,
            "artifact": entry.artifact,
            **usage,
        }
        for name, entry, usage in stages
    ]
    return data_frame(_columns(["stage", "kind", "state", "reason", "artifact", "seconds"], rows), rows)


def of_arms(evaluations: Mapping[str, Evaluation]) -> pandas.DataFrame:
    """A row for each arm and metric."""
    columns = ("evaluation", "arm", "metric", "mean", "low", "high")
    return data_frame(
        columns,
        (
            dict(zip(columns, (stage, arm.label, metric, value.mean, value.low, value.high), strict=True))
            for stage, evaluation in evaluations.items()
            for arm in evaluation.arms
            for metric, value in arm.all_metrics.items()
        ),
    )


def of_differences(evaluations: Mapping[str, Evaluation]) -> pandas.DataFrame:
    """A row for each comparison of two arms."""
    columns = ("evaluation", "arm", "against", "metric", "difference", "low", "high", "p", "adjusted_p", "verdict")
    return data_frame(
        columns,
        (
            {
                "evaluation": stage,
                "arm": evaluation.label(comparison.arm),
                "against": evaluation.label(comparison.against),
                "metric": metric,
                "difference": comparison.difference,
                "low": comparison.low,
                "high": comparison.high,
                "p": comparison.p,
                "adjusted_p": comparison.adjusted_p,
                "verdict": evaluation.verdict(comparison),
            }
            for stage, evaluation in evaluations.items()
            for metric, comparison in _comparisons(evaluation)
        ),
    )


def _comparisons(evaluation: Evaluation) -> Iterator[tuple[str, Comparison]]:
    """Every comparison with the name of its metric."""
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
    return data_frame(_columns(columns, rows), rows)


def of_settings(settings: Mapping[str, Any]) -> pandas.DataFrame:
    """A row for each setting."""
    return data_frame(("key", "value"), ({"key": key, "value": value} for key, value in flat(settings).items()))


def _columns(first: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ``first`` columns, then the others in the order in which rows have them."""
    return list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
