"""Charts of a stage's metrics.jsonl, by kind of stage; a figure that was not logged gets no chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from alignment.report.kit import text
from alignment.report.kit.axes import Points
from alignment.report.kit.plots import Line, curve
from alignment.report.run_page.run_records import Stage
from alignment.stages.base import Curve
from alignment.stages.registry import curves


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart as the page shows it; ``keys`` are the names in metrics.jsonl, separated by spaces."""

    title: str
    unit: str
    keys: str
    svg: Markup


def charts(stage: Stage) -> list[Chart]:
    """The stage's charts, each with at least one finite value."""
    drawn = []
    for choice in _choices(stage):
        lines = [
            Line(label=label, points=points)
            for key, label in zip(choice.keys, choice.labels, strict=True)
            if (points := points_of(stage.metrics, key, choice.over))
        ]
        if chart := _chart(choice, choice.keys, lines, title=choice.title, of=stage.name):
            drawn.append(chart)
    return drawn


def overlaid(stages: Sequence[tuple[str, int, Stage]]) -> list[Chart]:
    """One stage of several runs, each ``(tag, look, stage)``: a chart for each figure, a line for each run that has it.

    A guide line is drawn only if it holds for all of them.
    """
    drawn = []
    choices = min((_choices(stage) for _, _, stage in stages), key=lambda some: sum(c.guide is not None for c in some))
    for choice in choices:
        for key, label in zip(choice.keys, choice.labels, strict=True):
            lines = [
                Line(tag=tag, look=look, points=points)
                for tag, look, stage in stages
                if (points := points_of(stage.metrics, key, choice.over))
            ]
            title = f"{choice.title}, {label}" if label else choice.title
            if chart := _chart(choice, (key,), lines, title=title, of=stages[0][2].name):
                drawn.append(chart)
    return drawn


def _chart(choice: Curve, keys: tuple[str, ...], lines: list[Line], *, title: str, of: str) -> Chart | None:
    """The chart of a stage, or None if there is nothing to draw."""
    is_constant = len({y for line in lines for _, y in line.points}) == 1
    if not lines or (choice.only_if_it_moves and is_constant):
        return None
    svg = curve(lines, title=f"{of}, {title}", guide=choice.guide)
    return Chart(title=title, unit=choice.unit, keys=" ".join(keys), svg=svg)


def _choices(stage: Stage) -> list[Curve]:
    return curves(stage.kind, stage.config)


def num_gaps(stage: Stage) -> int:
    """How many drawn values were not finite."""
    keys = [key for choice in _choices(stage) for key in choice.keys]
    return sum(key in row and text.finite(row[key]) is None for row in stage.metrics for key in keys)


def points_of(rows: Sequence[Mapping[str, Any]], key: str, over: str) -> Points:
    """The points of ``key`` over the steps, or over the square root of the metric ``over``.

    A row without it is skipped, a value that is not finite is a gap.
    """
    points = []
    for position, row in enumerate(rows, start=1):
        if key in row:
            x = text.finite(row.get(over or "step"))
            if over:
                x = None if x is None else math.sqrt(max(0.0, x))
            points.append((float(position) if x is None else x, text.finite(row[key])))
    if over:
        points.sort(key=lambda point: point[0])
    return points if any(y is not None for _, y in points) else []
