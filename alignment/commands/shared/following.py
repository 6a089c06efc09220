"""Looks at a run again and again until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from alignment.core.errors import AlignmentError
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute import notes
from alignment.pipeline.execute.run_state import state_of
from alignment.pipeline.execute.run_view import RunReader, StageView
from alignment.records.run import RunRecord
from alignment.records.worker import Status
from alignment.report import doubts

_JOBS_SECONDS = 5.0
"""Time between two questions to Slurm."""


def reader_of(folder: Path) -> RunReader:
    """Reads a run of another process, which may have been killed."""
    return RunReader(folder, state_of=lambda record: state_of(folder, record))


class JobStates:
    """Why stages wait, as Slurm tells it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._states: dict[str, str] = {}
        self._next = 0.0

    def look(self) -> Mapping[str, str]:
        """Stage → its job in words; asks Slurm now and then, if the run has jobs."""
        if time.monotonic() >= self._next and slurm_jobs.read_jobs(self._folder):
            self._states = slurm_jobs.states(self._folder)
            self._next = time.monotonic() + _JOBS_SECONDS
        return self._states


def messages_of(folder: Path, record: RunRecord, stage: StageView) -> Iterator[str]:
    """What a stage that has ended says to the user: why it failed, its notes, and doubts about its result."""
    status = _status(folder / stage.name)
    if stage.state == "failed":
        yield f"{stage.name}: {'failed' if status is None else status.error}\n  log: {folder / stage.name / 'log.txt'}"
    if stage.state == "done" and status is not None:
        yield from (f"{stage.name}: {note}" for note in status.notes)
    if stage.state in ("done", "reused") and not doubts.is_smoke(record.profile):
        entry = record.stages[stage.name]
        try:
            yield from (f"{stage.name}: {doubt}" for doubt in notes.of_result(entry.kind, Path(entry.artifact)))
        except AlignmentError as error:  # whoever uses the result is refused; this only looks on
            yield f"{stage.name}: {error}"


def _status(folder: Path) -> Status | None:
    try:
        return Status.read(folder)
    except AlignmentError:
        return None
