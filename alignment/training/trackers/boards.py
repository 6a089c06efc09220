"""TensorBoard and trackio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.core import child_processes
from alignment.core.artifacts import Manifest
from alignment.job import StageSpec
from alignment.training.trackers.tracker import RESULT, Cell, Row, Tracker, curve_name, settings, stable_id


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
        """What the project's file has of this run, a dict for each call of ``log``."""
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
