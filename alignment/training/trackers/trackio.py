"""trackio: a project's SQLite file on this machine, and in it a trackio run per stage (docs/design/0055)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.core import processes
from alignment.core.artifacts import Manifest
from alignment.job import StageSpec
from alignment.training.trackers.curve_names import RESULT, curve_name
from alignment.training.trackers.tracker import Cell, Row, Tracker, settings, stable_id

FOLDER_VARIABLE = "TRACKIO_DIR"


class TrackioTracker(Tracker):
    """One trackio run. trackio writes it from a thread twice a second, so a killed stage may lack its last steps, which
    the next attempt offers again."""

    def __init__(self, spec: StageSpec) -> None:
        folder = _folder(spec)
        os.environ[FOLDER_VARIABLE] = str(folder)
        os.environ["TRACKIO_STORAGE_MODE"] = "sqlite"  # the other one cannot be read back, which a resume needs
        processes.show("trackio")
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
        """Waits until trackio has written everything. It cannot record how a stage ended.

        Raises:
            OSError: it has not. trackio only warns of what it cannot write.
        """
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

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE) or spec.run_folder.parents[2] / "trackio").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder
