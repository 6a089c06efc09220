"""A sign of life of every process, so that one that is stuck can be named: ``pulse/RANK.json`` in the work folder.

A thread looks once a second where the main thread is. A process is at work as long as that place changes or the process
(with what it started) uses its processor. Two kinds of waiting spin, so there the processor says nothing: for others in
a collective operation, and for a GPU, in whatever call reads a result of it. The driver reads the files
(pipeline/execute/heartbeats.py). Times are of a clock that nobody can set, and only compared with one another.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from alignment.records.worker import Heartbeat, heartbeat_file

PERIOD = 1.0
"""Seconds between two looks."""
IDLE = 0.05
"""Share of a processor below which a process is not at work."""
_OURS = f"{os.sep}alignment{os.sep}"
_COLLECTIVE = f"{os.sep}torch{os.sep}distributed{os.sep}"

Place = tuple[str, int, str]
"""A file, a line and a function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """Processor seconds of a process itself, and of all that it started."""

    own: float = 0.0
    started: float = 0.0

    def since(self, before: Used) -> Used:
        """What was used between two looks."""
        return Used(own=self.own - before.own, started=self.started - before.started)


@dataclass(kw_only=True, slots=True)
class Pulse:
    """What the process is about: the stage's phase, how many times it told its progress, whether it has a GPU."""

    phase: str = "starting"
    told: int = 0
    on_gpu: bool = False

    def start(self, work: Path, rank: int) -> None:
        """Begins to look after the calling thread, until the process ends."""
        watched = threading.get_ident()
        file = heartbeat_file(work, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._watch, args=(file, watched), name="pulse", daemon=True).start()

    def _watch(self, file: Path, watched: int) -> None:
        process = psutil.Process()
        seen: object = None
        used, since = Used(), time.monotonic()
        while True:
            frame = sys._current_frames().get(watched)
            if frame is None:  # the thread has ended, and the process is about to
                return
            places = places_of(frame)
            now, before, used = time.monotonic(), used, processor_seconds(process)
            works, waits = activity(places, used.since(before), on_gpu=self.on_gpu)
            if (self.told, places) != seen or works:
                seen, since = (self.told, places), now
            place = _shown(places)
            beat = Heartbeat(pid=process.pid, phase=self.phase, time=now, since=since, waits=waits, place=place)
            try:
                beat.write(file)
            except FileNotFoundError:  # the stage is done, and its work folder gone
                return
            except OSError:  # a disk that is full for now: the next look tries again
                pass
            time.sleep(PERIOD)


def places_of(frame: FrameType | None) -> list[Place]:
    """Where a thread is, innermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def activity(places: list[Place], used: Used, *, on_gpu: bool) -> tuple[bool, bool]:
    """Whether a process is at work by the processor seconds that it used, and whether it waits for others or a GPU."""
    collective = any(_COLLECTIVE in file_name for file_name, _, _ in places)
    own, started = used.own > IDLE * PERIOD, used.started > IDLE * PERIOD
    works = (started or (own and not on_gpu)) and not collective
    return works, collective or (own and on_gpu)


def processor_seconds(process: psutil.Process) -> Used:
    """Of the process, and of all that it started and that is still there."""
    return Used(own=_seconds([process]), started=_seconds(process.children(recursive=True)))


def _seconds(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _shown(places: list[Place]) -> str:
    """The innermost place in our own code, and what it called."""
    ours = next((place for place in places if _OURS in place[0]), places[0])
    names = [f"{Path(file).name}:{line} in {name}" for file, line, name in dict.fromkeys((ours, places[0]))]
    return ", at ".join(names)
