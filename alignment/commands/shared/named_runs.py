"""Runs that a user names, and whether they are still going on."""

from __future__ import annotations

from pathlib import Path

from alignment.config.faults import suggestion
from alignment.core.errors import ArtifactError, ConfigError
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute.run_state import LiveJobs, state_of
from alignment.pipeline.execute.run_view import RUNNING, UNKNOWN
from alignment.records.run import FILE, RunRecord


def run_names(output: Path) -> list[str]:
    """The names of the runs under ``output/runs``."""
    return sorted(path.parent.name for path in (output / "runs").glob(f"*/{FILE}"))


def run_folder(output: Path, run: str, *, where: str = "RUN") -> Path:
    """The folder of a run.

    Raises:
        ConfigError: there is no such run; the error suggests one.
    """
    names = run_names(output)
    if run not in names:
        raise ConfigError(f"no run {run!r} under {output / 'runs'}; {suggestion(run, names)}", where=where)
    return output / "runs" / run


def current_run(output: Path) -> Path:
    """The folder of the run that was started last, among those that go on if there are any.

    Raises:
        ConfigError: there is no run.
    """
    candidates = []
    for name in run_names(output):
        folder = output / "runs" / name
        try:
            record = RunRecord.read(folder)
        except ArtifactError:  # another run may be readable
            continue
        state = state_of(folder, record)
        candidates.append((state != UNKNOWN and goes_on(folder, state), record.started, name))
    if not candidates:
        raise ConfigError(
            f"no readable run under {output / 'runs'}",
            where="RUN",
            remedy="start one: align run RECIPE; or name the folder that contains runs/ with --output",
        )
    return output / "runs" / max(candidates)[2]


def goes_on(folder: Path, state: str, live_jobs: LiveJobs = slurm_jobs.live) -> bool:
    """Whether a run in this state may do more without another command: it may be running, or its Slurm jobs wait."""
    return state in (RUNNING, UNKNOWN) or (state == "waiting" and bool(live_jobs(folder)))
