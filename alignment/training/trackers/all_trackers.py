"""TensorBoard and trackio, and all trackers of a stage as one. A tracker never stops a training: its first fault is
reported once, and the stage continues without it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.config.run import LABELS
from alignment.core import child_processes
from alignment.core.artifacts import Manifest
from alignment.job import StageSpec
from alignment.training.trackers.mlflow import mlflow_sender
from alignment.training.trackers.tracker import (
    RESULT,
    Cell,
    Row,
    TableFiles,
    Tracker,
    columns_and_rows,
    curve_name,
    curves,
    settings,
    stable_id,
)
from alignment.training.trackers.wandb import WandbTracker


class TensorBoardTracker(Tracker):
    """Scalars by step; settings, samples and tables as text. Repeated steps replace earlier ones."""

    def __init__(self, spec: StageSpec) -> None:
        self._folder = spec.run_folder / "tensorboard"
        self._settings = settings(spec)
        self._writer: Any = None
        self._step = 0

    def log(self, rows: Sequence[Row]) -> None:
        """Writes and flushes steps, so that a killed process loses no step before its checkpoint."""
        for row in rows:
            writer = self._opened(row.step)
            self._step = row.step
            for name, value in row.curves.items():
                writer.add_scalar(name, value, row.step, walltime=row.time)
        if self._writer is not None:
            self._writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Writes a table as Markdown, which TensorBoard renders."""
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        self._opened(0).add_text(name, text, self._step)

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Writes the headline metrics, under ``result/``, and the fingerprints of the inputs."""
        for name, value in manifest.metrics.items():
            self._opened(0).add_scalar(RESULT + curve_name(name), value, self._step)
        lineage = {"artifact": folder.name, "fingerprint": manifest.fingerprint, "inputs": manifest.inputs}
        self._opened(0).add_text("lineage", _block(lineage), self._step)

    def close(self, *, done: bool) -> None:
        """Flushes; event files cannot record how a stage ended."""
        if self._writer is not None:
            self._writer.close()

    def _opened(self, step: int) -> Any:
        """The writer. It is opened at this attempt's first step, and makes readers forget earlier events from there
        on."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text("settings", _block(self._settings), step)
        return self._writer


def _cell(value: Cell) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _block(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return "\n".join(f"    {line}" for line in text.splitlines())


FOLDER_VARIABLE = "TRACKIO_DIR"


class TrackioTracker(Tracker):
    """One trackio run. trackio writes it from a thread twice a second, so a killed stage may lack its last steps, which
    the next attempt offers again."""

    def __init__(self, spec: StageSpec) -> None:
        folder = _folder(spec)
        os.environ[FOLDER_VARIABLE] = str(folder)
        os.environ["TRACKIO_STORAGE_MODE"] = "sqlite"  # the other one cannot be read back, which a resume needs
        child_processes.show("trackio")
        import trackio  # reads the environment

        if Path(trackio.TRACKIO_DIR) != folder:
            raise OSError(f"trackio was imported before the stage began, and would write to {trackio.TRACKIO_DIR}")
        self._trackio = trackio
        self._project = spec.tracking.project
        self._name = f"{spec.run}/{spec.stage}-{stable_id(spec)[:8]}"
        rows = self._stored()
        self._known = {name for row in rows for name in row}
        self._step = max((row["step"] for row in rows), default=0)
        self._run = trackio.init(
            project=self._project,
            name=self._name,
            group=spec.tracking.group or spec.run,
            config=settings(spec),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, rows: Sequence[Row]) -> None:
        """Writes the steps that the file does not have yet."""
        for row in rows:
            if row.step > self._step:
                self._run.log(dict(row.curves), step=row.step)
                self._step = row.step

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Writes a table at the last step, once."""
        self._log_once({name: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Writes the headline metrics under ``result/`` at the last step, once."""
        self._log_once({RESULT + curve_name(name): value for name, value in manifest.metrics.items()})

    def close(self, *, done: bool) -> None:
        """Waits until trackio has written everything. It cannot record how a stage ended. Raises OSError: it has not.
        trackio only warns of what it cannot write."""
        self._trackio.finish()
        written = max((row["step"] for row in self._stored()), default=0)
        if written < self._step:
            raise OSError(f"trackio wrote only {written} of {self._step} steps to {os.environ[FOLDER_VARIABLE]}")

    def _log_once(self, values: dict[str, Any]) -> None:
        if fresh := {name: value for name, value in values.items() if name not in self._known}:
            self._run.log(fresh, step=self._step)

    def _stored(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._trackio.SQLiteStorage.get_logs(self._project, run=self._name)
        return rows


def _folder(spec: StageSpec) -> Path:
    """The folder of all projects: the user's, or ``trackio`` beside ``runs``, so that one page compares all runs.
    Raises OSError: it cannot be written."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or spec.run_folder.parents[2] / "trackio").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


log = logging.getLogger(__name__)


class Trackers:
    """Forwards everything to each tracker. Before ``start``, and on processes that never call it, there are none.
    ``faults`` holds the messages about trackers that failed."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._open: dict[str, Tracker] = {}
        self._run = ""

    def start(self, spec: StageSpec) -> None:
        """Opens the trackers that the user asked for."""
        self._run = spec.run
        tracking = spec.tracking
        wanted: dict[str, tuple[bool, Callable[[], Tracker]]] = {
            "wandb": (tracking.wandb, lambda: WandbTracker(spec, self._warn)),
            "tensorboard": (tracking.tensorboard, lambda: TensorBoardTracker(spec)),
            "mlflow": (tracking.mlflow, lambda: mlflow_sender(spec)),
            "trackio": (tracking.trackio, lambda: TrackioTracker(spec)),
        }
        asked = {LABELS[name]: make for name, (is_asked, make) in wanted.items() if is_asked}
        for label, make in asked.items():
            try:
                self._open[label] = make()
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                self._give_up(label, error)
        if asked:
            self._open["the copy of tables"] = TableFiles(spec)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.catch_up([{**metrics, "step": step}])

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends steps as ``metrics.jsonl`` has them. A resumed stage sends those that it already has, because a killed
        attempt may not have sent all of them."""
        now = time.time()
        steps = [
            Row(step=row["step"], curves=curves({key: row[key] for key in row if key != "step"}), time=now)
            for row in rows
        ]
        if steps:
            self._each(lambda tracker: tracker.log(steps))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows as a table, if there are any."""
        if rows:
            columns, cells = columns_and_rows(rows)
            self._each(lambda tracker: tracker.table(name, columns, cells))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the artifact that was published in ``folder``."""
        self._each(lambda tracker: tracker.result(manifest, folder))

    def close(self, *, done: bool) -> None:
        """Flushes what was sent; ``done`` is True if the stage has finished."""
        self._each(lambda tracker: tracker.close(done=done))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for label, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 - a tracker raises whatever its transport raises
                self._give_up(label, error)

    def _give_up(self, label: str, error: Exception) -> None:
        self._open.pop(label, None)
        why = " ".join(str(error).split()) or type(error).__name__
        names = [name for name in LABELS if LABELS[name] == label]
        later = "".join(f"; to send the rest later, run: align track {self._run} --to {name}" for name in names)
        self._warn(f"{label} failed and is no longer used in this stage: {why}{later}")

    def _warn(self, message: str) -> None:
        self.faults.append(message)
        log.warning("%s", message)
