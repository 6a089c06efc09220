"""Which of a stage's processes is stuck, by the heartbeats that they write (alignment/training/heartbeat.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.core.errors import StageError
from alignment.records.worker import Heartbeat

SILENT = 10.0
"""Seconds without a sign after which a process does not run at all: it was stopped, or its machine is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """The last heartbeat of a process; ``silent`` are the reader's seconds since it was new."""

    rank: int
    last: Heartbeat
    silent: float = 0.0

    @property
    def idle(self) -> float:
        """Seconds without anything done."""
        return self.last.time - self.last.since + self.silent

    def __str__(self) -> str:
        return f"{self.last.phase}, {self.last.place}"


class Watch:
    """Reads the signs again and again, and measures by a clock of its own for how long each has been the same."""

    def __init__(self, work: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._work = work
        self._clock = clock
        self._new: dict[int, tuple[tuple[int, float], float]] = {}

    def look(self) -> list[Sign]:
        """One sign of every process that gave any, by rank."""
        now = self._clock()
        signs = []
        for rank, last in Heartbeat.read_all(self._work).items():
            beat = (last.pid, last.time)
            if rank not in self._new or self._new[rank][0] != beat:
                self._new[rank] = (beat, now)
            signs.append(Sign(rank=rank, last=last, silent=now - self._new[rank][1]))
        return signs


def refuse_stuck(signs: Sequence[Sign], *, processes: int, limit: float, stage: str) -> None:
    """Returns while any process is at work, or has yet to start.

    Raises:
        StageError: none did anything for ``limit`` seconds; it names the one for which the others wait.
    """
    if len(signs) < processes or any(sign.idle < limit for sign in signs):
        return
    silent = [sign for sign in signs if sign.silent >= SILENT]
    alone = [sign for sign in signs if not sign.last.waits]
    if not silent and not alone and processes > 1:
        places = "\n".join(f"  process {sign.rank}: {sign}" for sign in signs)
        raise StageError(
            f"nothing happened for {limit:g} seconds: all processes wait for one another or for their GPUs\n{places}",
            where=f"stage {stage}",
            remedy="start the run again to go on from the last checkpoint; launch.hang_seconds sets the limit",
        )
    culprit = (silent or alone or list(signs))[0]
    how = "does not run any more" if silent else "is stuck"
    raise StageError(
        f"process {culprit.rank} of {processes} {how} for {limit:g} seconds: {culprit}",
        where=f"stage {stage}",
        remedy="start the run again to go on from the last checkpoint; launch.hang_seconds sets the limit",
    )
