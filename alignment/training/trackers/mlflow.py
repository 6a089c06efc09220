"""MLflow: an experiment per project, an MLflow run per stage, which a resume finds by a tag (docs/design/0055)."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignment.core import child_processes
from alignment.core.artifacts import MANIFEST, Manifest
from alignment.job import StageSpec
from alignment.training.trackers.tracker import (
    RESULT,
    Cell,
    Row,
    Tracker,
    curve_name,
    flattened,
    settings,
    stable_id,
    tags,
)

log = logging.getLogger(__name__)
END_SECONDS = 60.0
"""How long the end of a stage waits at most until everything is sent."""
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 30.0
_ROWS_AT_ONCE = 500


class NotSentError(Exception):
    """The server lacks something of the stage."""


_Task = Row | Callable[[Tracker], object]
"""Something to be sent: a step, or else a call."""


class Sender(Tracker):
    """A tracker that forwards everything to the one that ``connect`` makes, in order, and repeats what failed.
    ``server`` names it in messages. ``connect`` is called in the thread. ``may_pass`` says whether an exception may be
    gone at the next attempt, as that of an unreachable server. After any other one nothing more is sent, and the next
    method that is called raises NotSentError. The tracker has to bear that a call is repeated whose answer was lost."""

    def __init__(
        self,
        server: str,
        connect: Callable[[], Tracker],
        *,
        may_pass: Callable[[Exception], bool],
        end_seconds: float = END_SECONDS,
    ) -> None:
        self._server = server
        self._connect = connect
        self._may_pass = may_pass
        self._end_seconds = end_seconds
        self._tasks: deque[_Task] = deque(
            [lambda _: None]
        )  # so that the server learns of a stage before its first step
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._failure: Exception | None = None
        self._unreachable = False
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, rows: Sequence[Row]) -> None:
        self._add(*rows)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self._add(lambda tracker: tracker.table(name, columns, rows))

    def result(self, manifest: Manifest, folder: Path) -> None:
        self._add(lambda tracker: tracker.result(manifest, folder))

    def close(self, *, done: bool) -> None:
        """Waits until everything is sent, but not for a server that does not answer. Raises NotSentError: something was
        not sent; the message says which steps."""
        self._add(lambda tracker: tracker.close(done=done))
        self._ending.set()
        self._thread.join(self._end_seconds)
        with self._changed:
            unsent = list(self._tasks)
        if unsent:
            why = self._failure or f"not sent within {self._end_seconds:g} seconds"
            raise NotSentError(f"{self._server} is missing {_described(unsent)}: {why}") from self._failure

    def _add(self, *tasks: _Task) -> None:
        if self._failure is not None:
            raise NotSentError(f"{self._server} refused: {self._failure}") from self._failure
        with self._changed:
            self._tasks.extend(tasks)
            self._changed.notify()

    def _work(self) -> None:
        """Sends until the task that closes is done, or an exception will not pass."""
        tracker: Tracker | None = None
        delay = _FIRST_DELAY
        while batch := self._next():
            try:
                tracker = tracker or self._connect()
                if isinstance(batch[0], Row):
                    tracker.log([row for row in batch if isinstance(row, Row)])
                else:
                    batch[0](tracker)
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                if self._ending.is_set() or not self._may_pass(error):
                    self._failure = error
                    return
                self._warn_once(error)
                self._ending.wait(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                delay = _FIRST_DELAY
                self._sent(batch)

    def _next(self) -> list[_Task]:
        """The steps that are first in the queue, or the one other task; it waits for one. Empty once all is done."""
        with self._changed:
            while not self._tasks:
                if self._ending.is_set():
                    return []
                self._changed.wait(1.0)
            steps = itertools.takewhile(lambda task: isinstance(task, Row), self._tasks)
            return list(itertools.islice(steps, _ROWS_AT_ONCE)) or [self._tasks[0]]

    def _sent(self, batch: Sequence[_Task]) -> None:
        with self._changed:
            for _ in batch:
                self._tasks.popleft()
        if self._unreachable:
            self._unreachable = False
            log.warning("%s is answering again", self._server)

    def _warn_once(self, error: Exception) -> None:
        if not self._unreachable:
            self._unreachable = True
            log.warning(
                "%s cannot be reached. The stage continues, its steps are in metrics.jsonl, and sending will be "
                "retried: %s",
                self._server,
                error,
            )


def _described(tasks: Sequence[_Task]) -> str:
    steps = [task.step for task in tasks if isinstance(task, Row)]
    return f"steps {steps[0]} to {steps[-1]} and everything after them" if steps else "the end of the stage"


URL_VARIABLE = "MLFLOW_TRACKING_URI"
_VARIABLES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""Seconds and repetitions of a request. MLflow's own, 120 seconds and 7 times, would outlast a stage; the sender
repeats requests itself. Variables that the user has set stay."""
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _LONGEST_PARAM = 1000, 100, 500
"""MLflow's limits of a request, and the length of a parameter that every version of the server takes."""
_ID = "alignment.id"
_TABLES = "mlflow.loggedArtifacts"
"""The tag by which MLflow's page and ``load_table`` find tables."""


def mlflow_sender(spec: StageSpec) -> Sender:
    """The tracker of a stage, behind a thread. It imports MLflow, which takes a second or two. Raises KeyError: neither
    the settings nor the environment name a server."""
    url = spec.tracking.mlflow_url or os.environ[URL_VARIABLE]
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    child_processes.show("mlflow")
    import mlflow.tracking  # noqa: F401 - here and not in the thread, beside which the stage imports libraries

    return Sender(f"MLflow at {url}", lambda: MlflowTracker(spec, url), may_pass=may_pass)


class MlflowTracker(Tracker):
    """One MLflow run. Every request may be repeated: nothing of it is then stored twice."""

    def __init__(self, spec: StageSpec, url: str) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=url)
        self._run_id = self._run_of(spec)
        run = self._client.get_run(self._run_id)
        self._known = set(run.data.metrics)
        self._step = self._last_step()
        self._log_settings(spec, logged=set(run.data.params))
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, rows: Sequence[Row]) -> None:
        """Sends steps, each within one request, which the server stores whole or not at all."""
        from mlflow.entities import Metric

        for some in _within_limit([row for row in rows if row.step > self._step]):
            metrics = [
                Metric(name, value, round(row.time * 1000), row.step)
                for row in some
                for name, value in row.curves.items()
            ]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._step = some[-1].step

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Stores a table as MLflow's ``log_table`` would, which appends to what is there; this replaces it."""
        file = f"{name}.json"
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_text(self._run_id, json.dumps(content, ensure_ascii=False), file)
        listed = json.loads(self._client.get_run(self._run_id).data.tags.get(_TABLES, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in listed:
            self._client.set_tag(self._run_id, _TABLES, json.dumps([*listed, entry]))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the headline metrics under ``result/``, the fingerprints of the inputs, and the manifest."""
        from mlflow.entities import Metric, RunTag

        named = {RESULT + curve_name(name): value for name, value in manifest.metrics.items()}
        lineage = {"artifact": folder.name, **{f"input.{slot}": value for slot, value in manifest.inputs.items()}}
        time = round(folder.stat().st_mtime * 1000)  # the same when the request is repeated
        self._client.log_batch(
            self._run_id,
            metrics=[Metric(name, value, time, self._step) for name, value in named.items() if name not in self._known],
            tags=[RunTag(f"alignment.{curve_name(name)}", value) for name, value in lineage.items()],
        )
        self._client.log_artifact(self._run_id, str(folder / MANIFEST))

    def close(self, *, done: bool) -> None:
        """Says how the stage ended; MLflow has no word for one that was stopped and will go on."""
        self._client.set_terminated(self._run_id, status="FINISHED" if done else "KILLED")

    def _run_of(self, spec: StageSpec) -> str:
        experiment = self._experiment_of(spec.tracking.project)
        own = f"tags.`{_ID}` = '{stable_id(spec)}'"
        for run in self._client.search_runs([experiment], filter_string=own, max_results=1):
            return str(run.info.run_id)
        described = {
            _ID: stable_id(spec),
            "alignment.group": spec.tracking.group or spec.run,
            "alignment.stage": spec.stage,
            "alignment.kind": spec.config.kind,
            "alignment.fingerprint": spec.fingerprint,
            "alignment.tags": ", ".join(tags(spec)),
        }
        run = self._client.create_run(experiment, tags=described, run_name=f"{spec.run}/{spec.stage}")
        return str(run.info.run_id)

    def _experiment_of(self, project: str) -> str:
        """The id of an experiment. Another stage may make it at the same moment, and then this one finds it."""
        from mlflow.exceptions import MlflowException

        for attempt in range(2):
            if (experiment := self._client.get_experiment_by_name(project)) is not None:
                return str(experiment.experiment_id)
            try:
                return str(self._client.create_experiment(project))
            except MlflowException as error:
                if attempt or error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise AssertionError("the second attempt returns or raises")

    def _last_step(self) -> int:
        """The last step that the server has of any curve. The server only gives the newest value of all of them."""
        histories = (self._client.get_metric_history(self._run_id, name) for name in self._known)
        return max((metric.step for history in histories for metric in history), default=0)

    def _log_settings(self, spec: StageSpec, *, logged: set[str]) -> None:
        """Sends the settings as parameters, which MLflow never changes; those of the first attempt stay."""
        from mlflow.entities import Param

        named = {curve_name(name): str(value)[:_LONGEST_PARAM] for name, value in flattened(settings(spec)).items()}
        params = [Param(name, value) for name, value in named.items() if name not in logged]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + _PARAMS_AT_ONCE])


def may_pass(error: Exception) -> bool:
    """Whether a request that failed may succeed later: the server did not answer, or is overloaded or broken."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import HTTPError, RequestException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, RequestException)
    return status >= 500 or status in (408, 429)


def _within_limit(rows: Sequence[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        if part and sum(len(each.curves) for each in (*part, row)) > _METRICS_AT_ONCE:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
