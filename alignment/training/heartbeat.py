"""Heartbeats of every process, so that a stuck process can be named: ``heartbeats/RANK.json`` in the work folder. A
thread checks once a second where the main thread is. A process is at work as long as that location changes or the
process and its children use the processor. Two kinds of waiting spin, so processor time says nothing there: waiting for
other processes in a collective operation, and waiting for a GPU in any call that reads its result. The driver reads the
files (pipeline/execute/workers.py). Times are of the monotonic clock, and are only compared with each other."""

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

from alignment.core.child_processes import children_of
from alignment.records.worker import Heartbeat, heartbeat_file

PERIOD = 1.0
"""Seconds between heartbeats."""
IDLE = 0.05
"""Share of a processor's time below which a process counts as idle."""
_OURS = f"{os.sep}alignment{os.sep}"
_COLLECTIVE = f"{os.sep}torch{os.sep}distributed{os.sep}"
CodeLocation = tuple[str, int, str]
"""A file, a line and a function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorTime:
    """Processor seconds of a process itself, and of its children."""

    own: float = 0.0
    started: float = 0.0

    def since(self, before: ProcessorTime) -> ProcessorTime:
        """The seconds used since an earlier measurement."""
        return ProcessorTime(own=self.own - before.own, started=self.started - before.started)


@dataclass(kw_only=True, slots=True)
class HeartbeatWriter:
    """Writes a process's heartbeats. It knows the stage's phase, its number of progress reports, and whether it has a
    GPU."""

    phase: str = "starting"
    reports: int = 0
    on_gpu: bool = False

    def start(self, work: Path, rank: int) -> None:
        """Starts to watch the calling thread, until the process ends."""
        watched = threading.get_ident()
        file = heartbeat_file(work, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._watch, args=(file, watched), name="heartbeat", daemon=True).start()

    def _watch(self, file: Path, watched: int) -> None:
        process = psutil.Process()
        seen: object = None
        used, since = ProcessorTime(), time.monotonic()
        while True:
            # No frame may be kept in a variable: it keeps those of its function, such as a pass's activations.
            stack = call_stack(sys._current_frames().get(watched))
            if not stack:  # the thread has ended, and the process is about to
                return
            now, before, used = time.monotonic(), used, processor_seconds(process)
            works, waits = activity(stack, used.since(before), on_gpu=self.on_gpu)
            if (self.reports, stack) != seen or works:
                seen, since = (self.reports, stack), now
            location = _described(stack)
            heartbeat = Heartbeat(
                pid=process.pid, phase=self.phase, time=now, since=since, waits=waits, location=location
            )
            try:
                heartbeat.write(file)
            except FileNotFoundError:  # the stage is done, and its work folder gone
                return
            except OSError:  # the disk may be full for now; the next heartbeat tries again
                pass
            time.sleep(PERIOD)


def call_stack(frame: FrameType | None) -> list[CodeLocation]:
    """The locations in a thread's call stack, innermost first."""
    stack = []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return stack


def activity(stack: list[CodeLocation], used: ProcessorTime, *, on_gpu: bool) -> tuple[bool, bool]:
    """Whether a process is at work, judged by its processor seconds, and whether it waits for others or a GPU."""
    collective = any(_COLLECTIVE in file_name for file_name, _, _ in stack)
    own, started = used.own > IDLE * PERIOD, used.started > IDLE * PERIOD
    works = (started or (own and not on_gpu)) and not collective
    return works, collective or (own and on_gpu)


def processor_seconds(process: psutil.Process) -> ProcessorTime:
    """Processor seconds of the process and of its living children."""
    return ProcessorTime(own=_seconds([process]), started=_seconds(children_of(process, recursive=True)))


def _seconds(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _described(stack: list[CodeLocation]) -> str:
    own_location = next((location for location in stack if _OURS in location[0]), stack[0])
    names = [f"{Path(file).name}:{line} in {name}" for file, line, name in dict.fromkeys((own_location, stack[0]))]
    return ", at ".join(names)
