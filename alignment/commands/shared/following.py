"""Looks at a run again and again until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from alignment.config.faults import suggestion
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute import notes
from alignment.pipeline.execute.run_state import LiveJobs, as_it_is
from alignment.pipeline.execute.run_view import RUNNING, UNKNOWN, RunReader, StageView
from alignment.records.run import FILE, RunRecord
from alignment.records.worker import Status
from alignment.report import doubts
from alignment.report.run_page.run_records import artifact_folder


def run_names(output: Path) -> list[str]:
    """The names of the runs under ``output/runs``."""
    return sorted(path.parent.name for path in (output / "runs").glob(f"*/{FILE}"))


def run_folder(output: Path, run: str) -> Path:
    """The folder of a run. Raises ConfigError: there is no such run; the error suggests one."""
    names = run_names(output)
    if run not in names:
        raise ConfigError(f"no run of this name under {output / 'runs'}; {suggestion(run, names)}", where=run)
    return output / "runs" / run


def current_run(output: Path) -> Path:
    """The folder of the run that was started last, among those that go on if there are any. Raises ConfigError."""
    candidates = []
    for folder in (output / "runs" / name for name in run_names(output)):
        with suppress(ArtifactError):  # another run may be readable
            record = RunRecord.read(folder)
            state = as_it_is(folder, record).state
            candidates.append((state != UNKNOWN and goes_on(folder, state), record.started, folder))
    if not candidates:
        remedy = "start one: align run RECIPE; or name the folder that contains runs/ with --output"
        raise ConfigError("no readable run here", where=str(output / "runs"), remedy=remedy)
    return max(candidates)[2]


def goes_on(folder: Path, state: str, live_jobs: LiveJobs = slurm_jobs.live) -> bool:
    """Whether a run in this state may do more without another command: it may be running, or its Slurm jobs wait."""
    return state in (RUNNING, UNKNOWN) or (state == "waiting" and bool(live_jobs(folder)))


_JOBS_SECONDS = 5.0
"""Time between two questions to Slurm."""


class FollowedRun:
    """A run of another process, which may have been killed. Slurm is asked about its jobs now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = RunReader(folder, as_it_is=lambda record: as_it_is(folder, record, self._jobs))
        self._live: Mapping[str, str] | None = {}
        self._states: dict[str, str] = {}
        self._next = 0.0

    def goes_on(self, state: str) -> bool:
        """Whether the run does more in this state without another command."""
        return goes_on(self.folder, state, self._jobs)

    def reasons(self) -> dict[str, str]:
        """Stage → its job in words, for jobs that wait."""
        self._ask()
        return {stage: job for stage, job in self._states.items() if " PENDING" in job}

    def _jobs(self, _: Path) -> Mapping[str, str] | None:
        self._ask()
        return self._live

    def _ask(self) -> None:
        if time.monotonic() >= self._next and slurm_jobs.read_jobs(self.folder):
            self._live, self._states = slurm_jobs.live(self.folder), slurm_jobs.states(self.folder)
            self._next = time.monotonic() + _JOBS_SECONDS


def messages_of(folder: Path, record: RunRecord, stage: StageView) -> Iterator[str]:
    """What a stage that has ended says to the user: why it failed, its notes, and doubts about its result."""
    status = None
    with suppress(AlignmentError):
        status = Status.read(folder / stage.name)
    if stage.state == "failed":
        yield f"{stage.name}: {'failed' if status is None else status.error}\n  log: {folder / stage.name / 'log.txt'}"
    if stage.state == "done" and status is not None:
        yield from (f"{stage.name}: {note}" for note in status.notes)
    if stage.state in ("done", "reused") and not doubts.is_smoke(record.profile):
        entry = record.stages[stage.name]
        try:
            if (artifact := artifact_folder(folder, stage.name, entry)) is not None:
                yield from (f"{stage.name}: {doubt}" for doubt in notes.of_result(entry.kind, artifact))
        except AlignmentError as error:  # whoever uses the result is refused; this only looks on
            yield f"{stage.name}: {error}"
