"""The state of a run, which a killed driver could not record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from alignment.core.locks import is_held
from alignment.pipeline.backends import slurm_jobs
from alignment.records.run import RunRecord

KILLED = "killed"
LiveJobs = Callable[[Path], Mapping[str, str]]
"""The jobs of a run that wait or run, by stage."""


def state_of(run_folder: Path, record: RunRecord, live_jobs: LiveJobs = slurm_jobs.live) -> str:
    """The recorded state, or ``killed`` if a running run has neither a locked lock file nor a Slurm job.

    On some file systems the lock of a job on another machine is invisible here.
    """
    if record.state != "running" or is_held(run_folder / "lock") or live_jobs(run_folder):
        return record.state
    latest = RunRecord.read(run_folder).state  # it may have ended since the record was read
    return KILLED if latest == "running" else latest
