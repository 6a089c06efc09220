"""Charts of a stage's metrics.jsonl, by kind of stage, and of the primary metric over the amount of training data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from markupsafe import Markup

from alignment.records.evaluation import Evaluation
from alignment.records.interval import Interval
from alignment.report.kit import text
from alignment.report.kit.plots import Line, Points, curve, interval_curve
from alignment.report.run_page.run_records import Run, Stage
from alignment.report.run_page.run_tables import Row
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
    for choice in curves(stage.kind, stage.config):
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
    A run has a line only in charts that its own settings give it: a figure may have another title or unit in another
    run. A guide line is drawn only if it holds for all lines."""
    drawn = []
    runs = [(tag, look, stage, _figures(stage)) for tag, look, stage in stages]
    for figure in dict.fromkeys(figure for *_, figures in runs for figure in figures):
        known = [(tag, look, stage, figures[figure]) for tag, look, stage, figures in runs if figure in figures]
        lines = [
            Line(tag=tag, look=look, points=points)
            for tag, look, stage, _ in known
            if (points := points_of(stage.metrics, figure.key, figure.over))
        ]
        choices = [choice for *_, (choice, _) in known]
        shared = choices[0]
        if len({choice.guide for choice in choices}) > 1:
            shared = replace(shared, guide=None, unit=figure.unit)
        label = next((label for *_, (_, label) in known if label), "")
        title = f"{figure.title}, {label}" if label else figure.title
        if chart := _chart(shared, (figure.key,), lines, title=title, of=stages[0][2].name):
            drawn.append(chart)
    return drawn


class _Figure(NamedTuple):
    """What a line shows; two runs have it in one chart if all of this is equal. ``unit`` says nothing of a guide."""

    title: str
    unit: str
    key: str
    over: str


def _figures(stage: Stage) -> dict[_Figure, tuple[Curve, str]]:
    return {
        _Figure(choice.title, choice.unit.partition("dotted:")[0].rstrip("; "), key, choice.over): (choice, label)
        for choice in curves(stage.kind, stage.config)
        for key, label in zip(choice.keys, choice.labels, strict=True)
    }


def _chart(choice: Curve, keys: tuple[str, ...], lines: list[Line], *, title: str, of: str) -> Chart | None:
    is_constant = len({y for line in lines for _, y in line.points}) == 1
    if not lines or (choice.only_if_it_moves and is_constant):
        return None
    svg = curve(lines, title=f"{of}, {title}", guide=choice.guide, over_steps=not choice.over)
    return Chart(title=title, unit=choice.unit, keys=" ".join(keys), svg=svg)


def num_gaps(stage: Stage) -> int:
    """How many drawn values were not finite."""
    keys = [key for choice in curves(stage.kind, stage.config) for key in choice.keys]
    return sum(key in row and text.finite(row[key]) is None for row in stage.metrics for key in keys)


def points_of(rows: Sequence[Mapping[str, Any]], key: str, over: str) -> Points:
    """The points of ``key`` over the steps, or over the square root of the metric ``over``. A row without it is
    skipped, a value that is not finite is a gap."""
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


AMOUNT = ("fraction", "limit")
"""The settings that limit how much of a stage's data is used."""


class Point(NamedTuple):
    """An evaluated stage that learned from ``rows`` rows, and its mean of the primary metric."""

    stage: Stage
    rows: float
    mean: Interval


def size_curves(run: Run) -> list[Row]:
    """A plot for every kind of stage that was trained from one model on several amounts of the same data. Apart from
    the amount only the optimiser's settings may differ, because fewer rows may need more epochs."""
    evaluation = run.evaluation
    if evaluation is None:
        return []
    groups: dict[str, list[Point]] = {}
    for point in sorted(_points(run.stages, evaluation), key=lambda point: point.rows):
        groups.setdefault(_shared(point.stage), []).append(point)
    return [_size_curve(points, evaluation) for points in groups.values() if points[0].rows < points[-1].rows]


def _points(stages: Sequence[Stage], evaluation: Evaluation) -> Iterator[Point]:
    known = {f"stage:{stage.name}": stage for stage in stages}
    for arm in evaluation.arms:
        stage, mean = known.get(arm.name), evaluation.primary_of(arm)
        if stage is None or mean is None:
            continue
        rows = stage.headlines.get("rows", 0.0)
        if rows >= 1:
            yield Point(stage, rows, mean)


def _shared(stage: Stage) -> str:
    """The stage's identity without its name, the amount of its data and the optimiser's settings."""
    identity = _without(stage.manifest.identity if stage.manifest else None, "stage")
    config = _without(_config(stage), "optim")
    data = _without(config.get("data"), *AMOUNT)
    return json.dumps([stage.kind, {**identity, "config": {**config, "data": data}}], sort_keys=True)


def _config(stage: Stage) -> dict[str, Any]:
    return _without(_without(stage.manifest.identity if stage.manifest else None).get("config"))


def _without(value: Any, *keys: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in keys} if isinstance(value, dict) else {}


def _size_curve(points: list[Point], evaluation: Evaluation) -> Row:
    kind = points[0].stage.kind
    init = dict(points[0].stage.inputs).get("init", "")
    start_arm = evaluation.arm(init)
    start = None if start_arm is None else evaluation.primary_of(start_arm)
    caption = "over rows trained on (log scale), with 95\u202f% intervals over prompts"
    if start is not None:
        caption += f"; dotted: {evaluation.label(init)}, where each run starts"
    caption += "; each point is one run, so the variation between seeds or rows is not shown"
    optims = {json.dumps(_config(point.stage).get("optim"), sort_keys=True) for point in points}
    if len(optims) > 1:
        caption += "; the optimiser’s settings differ too"
    svg = interval_curve(
        [(point.rows, point.mean) for point in points],
        title=f"{kind}, {evaluation.primary} over rows",
        guide=None if start is None else start.mean,
    )
    return {"title": f"{evaluation.primary} of {kind}", "caption": caption, "svg": svg}
