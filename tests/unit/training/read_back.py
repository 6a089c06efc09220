"""What each tracker has of a stage: its curves as ``{(key, step): [value, …]}``, a value for each time it is stored."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable

import pytest

from alignment.job import StageSpec
from alignment.training.trackers.tracker import stable_id
from alignment.training.trackers.wandb import records

Curves = dict[tuple[str, int], list[float]]


def curves_of(tracker: str, spec: StageSpec) -> Curves:
    return READERS[tracker](spec)


def last_step(tracker: str, spec: StageSpec) -> int:
    return max((step for _, step in curves_of(tracker, spec)), default=0)


def _joined(points: Iterable[tuple[str, int, float]]) -> Curves:
    curves: Curves = {}
    for key, step, value in points:
        if not key.startswith(("result/", "samples")):
            curves.setdefault((key, step), []).append(value)
    return curves


def _wandb(spec: StageSpec) -> Curves:
    histories = [
        record.history
        for file in sorted((spec.run_folder / "wandb").rglob("*.wandb"))
        for record in records(file)
        if record.HasField("history")
    ]
    return _joined(
        ("/".join(item.nested_key), history.step.num, json.loads(item.value_json))
        for history in histories
        for item in history.item
        if item.nested_key[0] != "step" and not item.nested_key[0].startswith("_")
    )


def _tensorboard(spec: StageSpec) -> Curves:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(spec.run_folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return _joined((tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag))


def _trackio(spec: StageSpec) -> Curves:
    file = spec.run_folder.parents[2] / "trackio" / f"{spec.tracking.project}.db"
    if not file.is_file():
        return {}
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    name = f"{spec.run}/{spec.stage}-{stable_id(spec)[:8]}"
    rows = connection.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)).fetchall()
    connection.close()
    return _joined((key, step, value) for step, metrics in rows for key, value in json.loads(metrics).items())


def _mlflow(spec: StageSpec) -> Curves:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=spec.tracking.mlflow_url)
    experiment = client.get_experiment_by_name(spec.tracking.project)
    if experiment is None:
        return {}
    own = f"tags.`alignment.id` = '{stable_id(spec)}'"
    runs = client.search_runs([experiment.experiment_id], filter_string=own)
    assert len(runs) <= 1, "a stage is one MLflow run"
    return _joined(
        (metric.key, metric.step, metric.value)
        for run in runs
        for key in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, key)
    )


READERS: dict[str, Callable[[StageSpec], Curves]] = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
