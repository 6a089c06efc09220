"""The primary metric over the amount of training data, for stages that differ only in that amount."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from alignment.records.evaluation import Evaluation
from alignment.records.interval import Interval
from alignment.report.kit.plots import interval_curve
from alignment.report.run_page.run_records import Run, Stage
from alignment.report.run_page.run_tables import Row

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
    return [_drawn(points, evaluation) for points in groups.values() if points[0].rows < points[-1].rows]


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


def _drawn(points: list[Point], evaluation: Evaluation) -> Row:
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
