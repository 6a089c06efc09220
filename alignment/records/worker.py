"""What a worker writes while it runs and when it ends, for the driver and the report to read (docs/design/0001).

``progress.json`` and ``heartbeats/RANK.json`` are in the stage's work folder, ``status.json`` in its folder of the run.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import time as now

from alignment.core import typed_json
from alignment.core.errors import PREEMPTED as PREEMPTED_CODE
from alignment.core.errors import ArtifactError

PROGRESS = "progress.json"
STATUS = "status.json"
HEARTBEATS = "heartbeats"
PARTS = "part-*.json"
"""Parts of a result in the folder ``checkpoints`` of a stage that stores them as they are made."""
REPLIES = ("*.work.jsonl", "scorer_replies/*.jsonl")
"""Replies of servers in a stage's work folder, which grow while it asks; asking again would cost money."""
DONE, FAILED, PREEMPTED = "done", "failed", "preempted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a stage is: ``Progress(phase="training", step=12, total=57, figures={"loss": 1.83})``."""

    phase: str
    step: int = 0
    total: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    version: int = 1

    def write(self, work: Path) -> None:
        """Replaces the file; a power cut may lose it."""
        typed_json.write(work / PROGRESS, self, durable=False)

    @staticmethod
    def read(work: Path) -> Progress | None:
        """The last progress of a running stage, or None if there is none yet or it cannot be read now."""
        # Another machine may have replaced the file just now (ESTALE); the next look sees it.
        with suppress(FileNotFoundError, ArtifactError):
            return typed_json.read(work / PROGRESS, Progress, remedy="")
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How a stage ended: ``done``, ``failed`` or ``preempted``. ``error`` is one readable block, ``where`` names the
    stage and the process, ``time`` is in seconds since 1970, ``notes`` are sentences about a stage that ended well."""

    state: str = ""
    exit_code: int = 1
    error: str = ""
    where: str = ""
    time: float | None = None
    notes: list[str] = field(default_factory=list)
    version: int = 1

    def write(self, run_folder: Path) -> None:
        """Writes the file so that it outlasts a power cut."""
        typed_json.write(run_folder / STATUS, self)

    @staticmethod
    def read(run_folder: Path) -> Status | None:
        """How the stage ended, or None if its processes did not write it. Raises ArtifactError: the file is damaged, or
        was written by a newer version."""
        try:
            remedy = f"start the run again; the stage's log is {run_folder / 'log.txt'}"
            return typed_json.read(run_folder / STATUS, Status, remedy=remedy)
        except FileNotFoundError:
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """A process was at ``location`` in ``phase``, and has done nothing since ``since``.

    ``time`` and ``since`` are seconds of the process's own monotonic clock, which cannot be compared with another
    machine's. ``waits`` is True while it waits for other processes in a collective operation, or for a GPU."""

    pid: int
    phase: str
    time: float
    since: float
    waits: bool
    location: str
    version: int = 1

    def write(self, file: Path) -> None:
        """Replaces the file of a process (``heartbeat_file``); a power cut may lose it."""
        typed_json.write(file, self, durable=False)

    @staticmethod
    def read_all(work: Path) -> dict[int, Heartbeat]:
        """The last heartbeat of each process that has one, by rank and in its order."""
        heartbeats = {}
        for file in sorted((work / HEARTBEATS).glob("*.json"), key=lambda path: int(path.stem)):
            # The worker may have ended and removed the folder, or replaced the file on NFS (ESTALE).
            with suppress(FileNotFoundError, ArtifactError):
                heartbeats[int(file.stem)] = typed_json.read(file, Heartbeat, remedy="")
        return heartbeats


def heartbeat_file(work: Path, rank: int) -> Path:
    """Where the process of this rank writes."""
    return work / HEARTBEATS / f"{rank}.json"


def write_stopped_before_it_began(stage_file: Path) -> None:
    """Writes the status of a stage that a signal ended while it imported its libraries."""
    Status(
        state=PREEMPTED,
        exit_code=PREEMPTED_CODE,
        error="stopped on request before it started",
        where=f"stage {stage_file.parent.name}",
        time=now(),
    ).write(stage_file.parent)
