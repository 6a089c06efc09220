"""A sign of life of every process, so that one that is stuck can be named: ``pulse/RANK.json`` in the work folder.

A thread looks once a second where the main thread is. A process is at work as long as that place changes or the process
(with what it started) uses its processor; one that waits for others in a collective operation may spin, so there the
processor says nothing. The driver reads the files (alignment/pipeline/pulses.py).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from alignment.artifacts import write_json

PERIOD = 1.0
"""Seconds between two looks."""
IDLE = 0.05
"""Share of a processor below which a process is not at work."""
_OURS = f"{os.sep}alignment{os.sep}"
_COLLECTIVE = f"{os.sep}torch{os.sep}distributed{os.sep}"

Place = tuple[str, int, str]
"""A file, a line and a function."""


@dataclass(kw_only=True, slots=True)
class Pulse:
    """What the process is about: the stage's phase and how many times it told its progress."""

    phase: str = "starting"
    told: int = 0

    def start(self, folder: Path, rank: int) -> None:
        """Begins to look after the calling thread, until the process ends."""
        folder.mkdir(parents=True, exist_ok=True)
        watched = threading.get_ident()
        threading.Thread(target=self._watch, args=(folder / f"{rank}.json", watched), name="pulse", daemon=True).start()

    def _watch(self, file: Path, watched: int) -> None:
        process = psutil.Process()
        seen: object = None
        used, since = 0.0, time.time()
        while True:
            frame = sys._current_frames().get(watched)
            if frame is None:  # the thread has ended, and the process is about to
                return
            places = places_of(frame)
            waits = any(_COLLECTIVE in file_name for file_name, _, _ in places)
            now, before, used = time.time(), used, processor_seconds(process)
            works = used - before > IDLE * PERIOD and not waits
            if (self.told, places) != seen or works:
                seen, since = (self.told, places), now
            told = {"pid": process.pid, "phase": self.phase, "time": now, "since": since, "waits": waits}
            try:
                write_json(file, {**told, "place": _shown(places)}, durable=False)
            except FileNotFoundError:  # the stage is done, and its work folder gone
                return
            time.sleep(PERIOD)


def places_of(frame: FrameType | None) -> list[Place]:
    """Where a thread is, innermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def processor_seconds(process: psutil.Process) -> float:
    """Of the process and of all that it started and that is still there."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _shown(places: list[Place]) -> str:
    """The innermost place in our own code, and what it called."""
    ours = next((place for place in places if _OURS in place[0]), places[0])
    names = [f"{Path(file).name}:{line} in {name}" for file, line, name in dict.fromkeys((ours, places[0]))]
    return ", at ".join(names)
