"""Calls Slurm's own commands, each with a list of arguments and a time limit."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.config.launch import LaunchConfig, SlurmBackend
from alignment.core.errors import Busy, ConfigError

_ASK_SECONDS = 15.0
_SUBMIT_SECONDS = 120.0
_UNKNOWN_JOB = "Invalid job id"
_AWAY = re.compile("contact slurm controller|timed out", re.IGNORECASE)
"""What ``sbatch`` says if the controller cannot be reached, or is too busy to answer."""
_ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What Slurm says of a job: ``Job(state="PENDING", reason="Priority", exit_code=0)``. ``reason`` is why it waits,
    or the text ``None``, as Slurm writes it; ``exit_code`` is valid once it has ended."""

    state: str
    reason: str = "None"
    exit_code: int = 0

    @property
    def ended(self) -> bool:
        """Whether it will never run again."""
        return self.state in _ENDED

    def __str__(self) -> str:
        return self.state if self.reason in ("None", "") else f"{self.state} ({self.reason})"


def submission(launch: LaunchConfig) -> SlurmBackend | None:
    """How stages are submitted; None if they are not, as inside a job."""
    backend = launch.backend
    return backend if isinstance(backend, SlurmBackend) and backend.submit else None


def refuse_without_slurm() -> None:
    """Refuses a machine on which jobs cannot be submitted. Raises ConfigError: there is no ``sbatch``."""
    if shutil.which("sbatch") is None:
        remedy = "run the command on a login node of the cluster, load its slurm module, or use launch/backend=local"
        raise ConfigError("there is no sbatch on this machine", where="launch.backend", remedy=remedy)


def submit(file: Path, *, after: str | None) -> str:
    """Submits a job file, to start when the job ``after`` has ended well; returns the job's id. Raises ConfigError:
    Slurm refuses it, with the reason that Slurm gives; Busy: Slurm does not answer now."""
    argv = ["sbatch", "--parsable"]
    if after is not None:
        argv += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    outcome = _call([*argv, str(file)], seconds=_SUBMIT_SECONDS)
    if outcome is None or _AWAY.search(outcome.stderr):
        in_vain = f"sbatch gave no answer in {_SUBMIT_SECONDS:.0f} seconds"
        reason = in_vain if outcome is None else outcome.stderr.strip()
        raise Busy(f"Slurm does not answer: {reason}", where=str(file), remedy="try again when squeue works here")
    job = outcome.stdout.strip().partition(";")[0]  # the name of one of several clusters may follow
    if outcome.returncode != 0 or re.fullmatch(r"\d+", job, re.ASCII) is None:
        reason = outcome.stderr.strip() or outcome.stdout.strip() or "it gave no reason"
        remedy = "see launch.backend.partition, account and the other settings of launch.backend"
        raise ConfigError(f"sbatch refused it: {reason}", where=str(file), remedy=remedy)
    return job


def cancel(jobs: Sequence[str]) -> bool:
    """Cancels those of the jobs that Slurm knows; returns whether it answered that it did."""
    if not jobs:
        return True
    outcome = _call(["scancel", *jobs], seconds=_ASK_SECONDS)
    return outcome is not None and outcome.returncode == 0


def look(jobs: Sequence[str]) -> dict[str, Job] | None:
    """What Slurm knows of each job, by id. It knows ended jobs for some minutes, or for as long as it keeps accounts.
    None: Slurm is not there, or did not answer in time."""
    if not jobs:
        return {}
    queued = _queue(jobs)
    if queued is None:
        return None
    gone = [job for job in jobs if job not in queued]
    return queued | (_accounts(gone) if gone else {})


def _queue(jobs: Sequence[str]) -> dict[str, Job] | None:
    columns = "--Format=JobID:32,State:32,exit_code:16,Reason:64"
    argv = ["squeue", "--noheader", "--states=all", columns, f"--jobs={','.join(jobs)}"]
    outcome = _call(argv, seconds=_ASK_SECONDS)
    if outcome is None or (outcome.returncode != 0 and _UNKNOWN_JOB not in outcome.stderr):
        return None
    rows = [line.split(maxsplit=3) for line in outcome.stdout.splitlines()]
    return {
        row[0]: Job(state=row[1], exit_code=_exit_code(row[2]), reason="".join(row[3:]).strip())
        for row in rows
        if len(row) >= 3
    }


def _accounts(jobs: Sequence[str]) -> dict[str, Job]:
    """Jobs that are no longer in the queue; empty if the cluster keeps no accounts."""
    columns = "--format=JobIDRaw,State,ExitCode"
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", columns, f"--jobs={','.join(jobs)}"]
    outcome = _call(argv, seconds=_ASK_SECONDS)
    if outcome is None or outcome.returncode != 0:
        return {}
    rows = [line.split("|") for line in outcome.stdout.splitlines()]
    # A cancelled job's state reads "CANCELLED by 1000".
    return {row[0]: Job(state=row[1].split()[0], exit_code=_exit_code(row[2])) for row in rows if len(row) == 3}


def _exit_code(text: str) -> int:
    """``5`` of ``5:0``; the number after the colon is a signal."""
    code = text.partition(":")[0]
    return int(code) if code.isdecimal() else 0


def _call(argv: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
