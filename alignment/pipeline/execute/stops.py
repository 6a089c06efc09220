"""What a stop left of a stage: whether it saved, and jobs that stop again and again before anything is stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from alignment.core.errors import PREEMPTED, ArtifactError, Preempted, StageError
from alignment.pipeline.execute.display import Announce
from alignment.pipeline.execute.signals import Terminated
from alignment.records.run import Attempts
from alignment.records.worker import Status

_MOST_IN_VAIN = 3
"""Attempts in jobs. One or two may be stopped early for jobs that are more important."""


@contextmanager
def with_its_words(folder: Path, announce: Announce) -> Iterator[None]:
    """If a stop ends the block, announces what the worker in ``folder`` wrote about it: whether it could save."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, Preempted):
        with suppress(ArtifactError, OSError):
            status = Status.read(folder)
            if status is not None and status.exit_code == PREEMPTED and status.error:
                announce(status.error)
        raise


@contextmanager
def refused_in_vain(work: Path, stage: str) -> Iterator[None]:
    """Fails where a stop would let Slurm queue a job again and again that stores nothing before its time is over.

    Raises:
        StageError: the last attempts were all stopped before the stage had stored anything.
    """
    try:
        yield
    except (Terminated, Preempted) as stop:
        attempts = Attempts.read(work)
        if attempts.without_progress < _MOST_IN_VAIN:
            raise
        replace(attempts, without_progress=0).write(work)
        raise StageError(
            f"{attempts.without_progress} attempts in turn were stopped before it had stored anything, so another one"
            " would begin from the same place",
            where=f"stage {stage}",
            remedy="give its job more time with launch.backend.time",
        ) from stop
