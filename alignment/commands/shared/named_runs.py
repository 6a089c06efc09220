"""Runs that a user names, and whether they are still going on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from alignment.config.did_you_mean import suggestion
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.locks import is_held
from alignment.pipeline.backends import slurm_jobs
from alignment.records.run import FILE, RunRecord

LiveJobs = Callable[[Path], Mapping[str, str]]
"""The jobs of a run that wait or run, by stage."""


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
        candidates.append((goes_on(folder, state_of(folder, record)), record.started, name))
    if not candidates:
        raise ConfigError(
            f"no run that can be read under {output / 'runs'}",
            where="RUN",
            remedy="start one: align run RECIPE; or name the folder that holds runs/ with --output",
        )
    return output / "runs" / max(candidates)[2]


def state_of(folder: Path, record: RunRecord, live_jobs: LiveJobs = slurm_jobs.live) -> str:
    """The recorded state, or ``killed`` if a running run has neither a locked lock file nor a Slurm job.

    On some file systems the lock of a job on another machine is invisible here.
    """
    if record.state != "running" or is_held(folder / "lock") or live_jobs(folder):
        return record.state
    latest = RunRecord.read(folder).state  # it may have ended since the record was read
    return "killed" if latest == "running" else latest


def goes_on(folder: Path, state: str, live_jobs: LiveJobs = slurm_jobs.live) -> bool:
    """Whether a run in this state will do more without another command: it runs, or its Slurm jobs wait."""
    return state == "running" or (state == "waiting" and bool(live_jobs(folder)))
