"""The state of a run and its stages, which a killed driver could not record."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from alignment.core.artifacts import MANIFEST, verify
from alignment.core.errors import ArtifactError, Busy, Preempted
from alignment.core.locks import is_held, last_host
from alignment.core.wording import duration
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute.run_view import KILLED, RUNNING, UNKNOWN, work_folder
from alignment.pipeline.execute.signals import Terminated
from alignment.pipeline.remote.remote_checkpoints import local_work
from alignment.records.run import FILE, Attempts, RunRecord, StageEntry
from alignment.records.training import METRICS, readable_rows
from alignment.records.worker import HEARTBEATS, PROGRESS
from alignment.report.kit.text import finite
from alignment.report.run_page.run_records import artifact_folder


@contextmanager
def counted(work: Path) -> Iterator[Attempts]:
    """Counts an attempt at the stage that works in ``work``; the caller holds the stage's lock. If the block raises,
    its time is stored for the next attempt. It does not count if a process of an earlier attempt is still working on
    the stage (Busy)."""
    before = Attempts.read(work)
    attempt = Attempts(number=before.number + 1, earlier_seconds=_seconds_of(before, work), started=time.time())
    began, stored = time.monotonic(), local_work(work).progress
    attempt.write(work)
    try:
        yield attempt
    except Busy:
        before.write(work)
        raise
    except BaseException as error:
        seconds = attempt.earlier_seconds + time.monotonic() - began
        is_in_vain = isinstance(error, (Terminated, Preempted)) and local_work(work).progress <= stored
        in_vain = before.without_progress + 1 if is_in_vain else 0
        replace(attempt, earlier_seconds=seconds, started=0.0, without_progress=in_vain).write(work)
        raise


def _seconds_of(attempts: Attempts, work: Path) -> float:
    """The time of all attempts so far. An attempt whose driver was killed counts until the last sign of life of its
    processes. If there is none, as on a machine that continues another one's stage, the time up to the last logged step
    counts."""
    last = _last_written(*_signs_of_life(work)) if attempts.started else 0.0
    seconds = attempts.earlier_seconds + max(0.0, last - attempts.started)
    rows, _ = readable_rows(work / "content" / METRICS)
    return max(seconds, (finite(rows[-1].get("seconds")) or 0.0) if rows else 0.0)


def _signs_of_life(work: Path) -> list[Path]:
    return [work / PROGRESS, *(work / HEARTBEATS).glob("*.json")]


def _last_written(*files: Path) -> float:
    """When the newest of these files was written, in seconds since 1970; 0 if there is none."""
    times = [0.0]
    for file in files:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


_ASKED_TO_STOP = ("interrupted", "preempted")
"""The states of a run that was asked to stop."""
WAITING = "waiting"
"""The state of a run of which other stages are to be made by other calls."""
LiveJobs = Callable[[Path], Mapping[str, str] | None]
"""The jobs of a run that wait or run, by stage; None if Slurm does not answer."""


def as_it_is(run_folder: Path, record: RunRecord, live_jobs: LiveJobs = slurm_jobs.live) -> RunRecord:
    """The record with the states that nobody could write. A run that is recorded as running was ``killed`` if it has
    neither a locked lock file nor a Slurm job. So were its running stages, unless another process works on them, or
    stored the result after the driver was killed: then they are ``done``, and a plan reuses the result. The run is
    ``unknown`` if Slurm does not answer, or if it was started on another machine: some file systems do not show the
    locks of other machines."""
    if record.state != RUNNING or is_held(run_folder / "lock"):
        return record
    jobs = live_jobs(run_folder)
    if jobs:
        return record
    record = RunRecord.read(run_folder)  # it may have ended since the record was read
    if record.state != RUNNING:
        return record
    if jobs is None or (elsewhere(run_folder) and not slurm_jobs.read_jobs(run_folder)):
        return replace(record, state=UNKNOWN)
    stages = {name: _as_left(run_folder, name, entry) for name, entry in record.stages.items()}
    return replace(record, state=KILLED, stages=stages)


def elsewhere(run_folder: Path) -> str:
    """The machine on which the run was started, if it is not this one; empty if it is."""
    host = last_host(run_folder / "lock")
    return "" if host == socket.gethostname() else host


def explanation(run_folder: Path, record: RunRecord, *, now: Callable[[], float] = time.time) -> list[str]:
    """What is known about a run that stopped before its end, or may have, and what to do; empty for other states.
    ``record`` is that of ``as_it_is``."""
    if record.state in _ASKED_TO_STOP:
        return ["it was stopped; run the same command to continue"]
    if record.state not in (KILLED, UNKNOWN, WAITING):
        return []
    name = run_folder.name
    after_others = "run the same command with --wait to continue after that"
    if record.state == WAITING:
        busy = [
            stage
            for stage, entry in record.stages.items()
            if not entry.complete and _is_worked_on(work_folder(run_folder, stage, entry))
        ]
        return [f"another process is working on {', '.join(busy)}", after_others] if busy else []
    ago = duration(max(0.0, now() - _last_sign_of_life(run_folder, record)))
    seen = f"the last sign of life was {ago} ago"
    if record.state == UNKNOWN:
        host = elsewhere(run_folder)
        why = f"it was started on {host}" if host else "Slurm does not answer"
        return [
            f"{name} may still be running, which cannot be seen from here ({why}); {seen}",
            "if it has ended, run the same command to continue",
        ]
    busy = [stage for stage, entry in record.stages.items() if entry.state == RUNNING]
    if busy:
        return [
            f"{name} ended without recording how, but another process is still working on {', '.join(busy)}",
            after_others,
        ]
    return [f"{name} ended without recording how; {seen}", "run the same command to continue"]


def _last_sign_of_life(run_folder: Path, record: RunRecord) -> float:
    """By the clock of the file system, which may differ a little from this machine's."""
    files = [run_folder / FILE]
    for name, entry in record.stages.items():
        if entry.state in (RUNNING, KILLED):
            files += _signs_of_life(work_folder(run_folder, name, entry))
        elif entry.complete and (folder := artifact_folder(run_folder, name, entry)) is not None:
            files.append(folder / MANIFEST)
    return _last_written(*files)


def _as_left(run_folder: Path, name: str, entry: StageEntry) -> StageEntry:
    work = work_folder(run_folder, name, entry)
    if entry.state != RUNNING or _is_worked_on(work):
        return entry
    folder = artifact_folder(run_folder, name, entry)
    with suppress(ArtifactError):
        if folder is not None:
            return replace(entry, state="done", seconds=verify(folder, content=False).usage.get("seconds"))
    return replace(entry, state=KILLED, seconds=_seconds(entry, work))


def _is_worked_on(work: Path) -> bool:
    """Processes of a stage hold one of two locks as long as they live."""
    return is_held(work / "lock") or is_held(work / "worker.lock")


def _seconds(entry: StageEntry, work: Path) -> float | None:
    try:
        started = datetime.fromisoformat(entry.started).timestamp()
    except ValueError:  # a record of an older version
        return None
    last = _last_written(*_signs_of_life(work))
    return round(entry.earlier_seconds + last - started, 2) if last > started else None
