"""The curves of a stage as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.report.run_page.curves import points_of
from alignment.stages.registry import curves


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
