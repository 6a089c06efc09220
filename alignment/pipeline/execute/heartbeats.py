"""Signs of life of a stage's processes, and which of them is stuck (alignment/training/heartbeat.py writes them)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.core.errors import StageError

SILENT = 10.0
"""Seconds without a sign after which a process does not run at all: it was stopped, or its machine is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """The last sign of a process: it was at ``place`` in ``phase``, where nothing has happened since ``since``.

    ``time`` and ``since`` are seconds of its own monotonic clock, and say nothing beside another machine's; ``silent``
    are the reader's seconds since the sign was new. ``waits``: for others in a collective operation, or for a GPU.
    """

    rank: int
    pid: int
    phase: str
    time: float
    since: float
    waits: bool
    place: str
    silent: float = 0.0

    @property
    def idle(self) -> float:
        """Seconds without anything done."""
        return self.time - self.since + self.silent


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
        for sign in read_signs(self._work):
            beat = (sign.pid, sign.time)
            if sign.rank not in self._new or self._new[sign.rank][0] != beat:
                self._new[sign.rank] = (beat, now)
            signs.append(replace(sign, silent=now - self._new[sign.rank][1]))
        return signs


def read_signs(work: Path) -> list[Sign]:
    """One of every process that gave any, by rank."""
    signs = []
    for file in sorted(work.glob("pulse/*.json"), key=lambda path: int(path.stem)):
        with suppress(OSError):  # its worker is done and has removed the folder, or replaced the file on NFS (ESTALE)
            signs.append(Sign(rank=int(file.stem), **json.loads(file.read_text(encoding="utf-8"))))
    return signs


def refuse_stuck(signs: Sequence[Sign], *, processes: int, limit: float, stage: str) -> None:
    """Returns while any process is at work, or has yet to start.

    Raises:
        StageError: none did anything for ``limit`` seconds; it names the one for which the others wait.
    """
    if len(signs) < processes or any(sign.idle < limit for sign in signs):
        return
    silent = [sign for sign in signs if sign.silent >= SILENT]
    alone = [sign for sign in signs if not sign.waits]
    if not silent and not alone and processes > 1:
        places = "\n".join(f"  process {sign.rank}: {sign.phase}, {sign.place}" for sign in signs)
        raise StageError(
            f"nothing happened for {limit:g} seconds: all processes wait for one another or for their GPUs\n{places}",
            where=f"stage {stage}",
            remedy="start the run again to go on from the last checkpoint; launch.hang_seconds sets the limit",
        )
    culprit = (silent or alone or list(signs))[0]
    how = "does not run any more" if silent else "is stuck"
    raise StageError(
        f"process {culprit.rank} of {processes} {how} for {limit:g} seconds: {culprit.phase}, {culprit.place}",
        where=f"stage {stage}",
        remedy="start the run again to go on from the last checkpoint; launch.hang_seconds sets the limit",
    )
