"""Adds up the time of all attempts at a stage, although the process that measures it may be killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from alignment.core.errors import Busy, Preempted
from alignment.pipeline.execute.signals import Terminated
from alignment.pipeline.remote.remote_checkpoints import local_work
from alignment.records.run import Attempts
from alignment.records.training import METRICS, readable_rows
from alignment.records.worker import HEARTBEATS, PROGRESS
from alignment.report.kit.text import finite


@contextmanager
def counted(work: Path) -> Iterator[Attempts]:
    """Counts an attempt at the stage that works in ``work``; the caller holds the stage's lock.

    If the block raises, its time is stored for the next attempt. It does not count if a process of an earlier attempt
    is still working on the stage (Busy).
    """
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
    """The time of all attempts so far.

    An attempt whose driver was killed counts until the last sign of life of its processes. If there is none, as on a
    machine that continues another one's stage, the time up to the last logged step counts.
    """
    last = max(signs_of_life(work), default=0.0) if attempts.started else 0.0
    seconds = attempts.earlier_seconds + max(0.0, last - attempts.started)
    return max(seconds, _logged_seconds(work))


def signs_of_life(work: Path) -> Iterator[float]:
    """When the processes of the last attempt wrote their progress and their heartbeats, in seconds since 1970."""
    for file in (work / PROGRESS, *(work / HEARTBEATS).glob("*.json")):
        try:
            yield file.stat().st_mtime
        except OSError:
            continue


def _logged_seconds(work: Path) -> float:
    """The time of all steps that the stage has logged."""
    rows, _ = readable_rows(work / "content" / METRICS)
    return (finite(rows[-1].get("seconds")) or 0.0) if rows else 0.0
