"""The state of a run as its files tell it: of each stage how far it is, its curve, and what it waits for.

The driver of a run shows what it reads here, and so does ``align status --follow`` in another terminal.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from alignment.core.errors import ArtifactError
from alignment.core.files import parse_json
from alignment.records.run import RunRecord, StageEntry
from alignment.records.training import METRICS, TOKENS
from alignment.records.worker import Progress
from alignment.report.kit.text import finite
from alignment.report.run_page import run_records
from alignment.stages.registry import headline_curve, tokens_of

Clock = Callable[[], float]
"""Seconds that only go up."""


class Pace:
    """Estimates how long a stage's remaining steps take, from all steps since it was first seen. A window of seconds
    would not contain two steps of PPO, whose update and sampling take minutes. Phases that count the same steps, such
    as sampling and training, share an estimate."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._has_begun = False
        self._total: int | None = None
        self._first = self._latest = 0
        self._began = self._reached = 0.0

    def see(self, progress: Progress, *, first: int | None = None, seconds: float = 0.0) -> None:
        """Records the stage's progress now. For somebody who begins to watch later, ``first`` is an earlier step, which
        was done ``seconds`` before this one. It is used only where a new count of steps begins."""
        now = self._clock()
        if not self._has_begun or progress.total != self._total or progress.step < self._latest:
            self._has_begun = True
            self._total, self._first, self._began = progress.total, progress.step, now
            if first is not None and first < progress.step:
                self._first, self._began = first, now - seconds
            self._latest, self._reached = progress.step, now
        elif progress.step > self._latest:
            self._latest, self._reached = progress.step, now

    def left(self) -> float | None:
        """Seconds, or None before a step has been timed and after the last one."""
        done = self._latest - self._first
        if not self._total or not done or self._latest >= self._total:
            return None
        seconds = (self._total - self._latest) * (self._reached - self._began) / done
        return max(0.0, seconds - (self._clock() - self._reached))

    def per_second(self) -> float:
        """Steps a second; 0 before a step has been timed."""
        seconds = self._reached - self._began
        return (self._latest - self._first) / seconds if seconds > 0 else 0.0


TokensOfLine = Callable[[Mapping[str, Any]], float | None]
_RECENT = 20
"""Lines over which tokens are counted, so that a stage's slow first step counts no longer than it has to."""


@dataclass(kw_only=True, slots=True)
class StepCurve:
    """The values of one metric, step by step, and the time and tokens of these steps. A line without the metric has no
    value. ``num_tokens`` is how many tokens the lines count. ``recent`` are (seconds, tokens) since the stage began, of
    the last lines; ``first`` and ``last`` are (step, seconds) of the first and the last line."""

    values: list[float] = field(default_factory=list)
    num_tokens: float = 0.0
    recent: list[tuple[float, float]] = field(default_factory=list)
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None

    def add(self, row: dict[str, Any], metric: str, tokens_of_line: TokensOfLine) -> None:
        """Adds a line; one that has no count of all tokens so far adds its own."""
        step, seconds, tokens = (finite(row.get(name)) for name in ("step", "seconds", TOKENS))
        if tokens is None and (own := tokens_of_line(row)) is not None:
            tokens = self.num_tokens + own
        if metric in row:
            value = finite(row[metric])
            self.values.append(math.nan if value is None else value)
        if step is not None and seconds is not None:
            self.last = (int(step), seconds)
            self.first = self.first or self.last
        if seconds is not None and tokens is not None:
            self.num_tokens = tokens
            self.recent = [*self.recent[1 - _RECENT :], (seconds, tokens)]

    def tokens_per_second(self) -> float | None:
        """Over the last steps; None before two steps have counted tokens."""
        if len(self.recent) < 2:
            return None
        (start, before), (end, after) = self.recent[0], self.recent[-1]
        return (after - before) / (end - start) if end > start and after >= before else None


class CurveFile:
    """Reads the lines that are added to a file; one that was shortened or replaced is read again from its start."""

    def __init__(self, path: Path, metric: str, tokens_of_line: TokensOfLine) -> None:
        self._path, self._metric, self._tokens_of_line = path, metric, tokens_of_line
        self._read = 0
        self._inode = 0
        self._unfinished = b""
        self.curve = StepCurve()

    def look(self) -> StepCurve:
        """The curve as far as it is written; a line counts once it has ended, and one that is not JSON does not."""
        with suppress(OSError), self._path.open("rb") as stream:  # not there yet, or not for a moment (ESTALE)
            self._take_in(stream)
        return self.curve

    def _take_in(self, stream: BinaryIO) -> None:
        status = os.fstat(stream.fileno())
        if status.st_ino != self._inode or status.st_size < self._read:
            self._inode, self._read, self._unfinished, self.curve = status.st_ino, 0, b"", StepCurve()
        stream.seek(self._read)
        added = stream.read()
        self._read += len(added)
        *lines, self._unfinished = (self._unfinished + added).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                if isinstance(row := parse_json(line), dict):
                    self.curve.add(row, self._metric, self._tokens_of_line)


RUNNING = "running"
KILLED = "killed"
"""The state of a run whose driver ended without recording how, and of its stages that were running."""
UNKNOWN = "unknown"
"""The state of a run that was running when this could be seen last."""
STOPPED = "stopped"
"""The state of a stage that was running when it was asked to stop; run.json has it as waiting, with its seconds."""
_GOES_ON = (RUNNING, "waiting", UNKNOWN)
"""States of a run whose waiting stages will be run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownCurve:
    """The metric that matters for a kind of stage: ``ShownCurve(title="accuracy", values=[0.5, 0.71])``, by step."""

    title: str
    values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageView:
    """A stage: ``waiting``, ``running``, ``stopped``, ``killed``, ``done``, ``reused`` or ``failed``. ``seconds`` is
    how long its ``attempts`` took so far. ``waits_for`` says which stages come before it, ``blocked`` what else it
    waits for, such as a job in a queue. Only a running stage has ``progress`` and the fields after it; each is None
    while it is unknown."""

    name: str
    state: str
    reason: str = ""
    artifact: str = ""
    seconds: float | None = None
    attempts: int = 1
    waits_for: str = ""
    blocked: str = ""
    progress: Progress | None = None
    seconds_left: float | None = None
    steps_per_second: float | None = None
    tokens_per_second: float | None = None
    curve: ShownCurve | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """A run and its stages in their order; ``state`` is that of the run. ``record`` is what it was read from."""

    name: str
    state: str
    stages: list[StageView] = field(default_factory=list)
    record: RunRecord = field(default_factory=RunRecord)

    @property
    def num_complete(self) -> int:
        """How many stages have a result."""
        return sum(stage.state in ("done", "reused") for stage in self.stages)


class RunReader:
    """Reads the files of a run again at each look. ``as_it_is`` adds to a record what nobody could write, such as that
    the run was killed. ``now`` gives seconds since 1970, ``clock`` seconds that only go up."""

    def __init__(
        self,
        folder: Path,
        *,
        as_it_is: Callable[[RunRecord], RunRecord] = lambda record: record,
        clock: Clock = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self._as_it_is, self._clock, self._now = folder, as_it_is, clock, now
        self._record: RunRecord | None = None
        self._running: dict[str, _RunningStage] = {}

    def look(self, blocked: Mapping[str, str] | None = None) -> RunView:
        """The run now. ``blocked`` says what stages wait for that no file of the run tells. Raises ArtifactError:
        run.json is missing or cannot be read, and never could."""
        record = self._as_it_is(self._read())
        stages = [self._stage(name, record, (blocked or {}).get(name, "")) for name in record.stages]
        return RunView(name=record.name or self.folder.name, state=record.state, stages=stages, record=record)

    def _read(self) -> RunRecord:
        """The record of the run; the last one if it cannot be read for a moment (ESTALE)."""
        try:
            self._record = RunRecord.read(self.folder)
        except ArtifactError:
            if self._record is None:
                raise
        assert self._record is not None
        return self._record

    def _stage(self, name: str, record: RunRecord, blocked: str) -> StageView:
        entry = record.stages[name]
        view = StageView(
            name=name,
            state=STOPPED if entry.state == "waiting" and entry.seconds is not None else entry.state,
            reason=entry.reason,
            artifact=Path(entry.artifact).name,
            seconds=entry.seconds,
            attempts=entry.attempts,
            blocked=blocked,
            waits_for=_waits_for(entry, record),
        )
        if entry.state != "running":
            self._running.pop(name, None)
            return view
        if name not in self._running:
            work = work_folder(self.folder, name, entry)
            self._running[name] = _RunningStage(entry, work, record.settings_of(name), self._clock)
        return self._running[name].added_to(replace(view, seconds=self._elapsed(entry)))

    def _elapsed(self, entry: StageEntry) -> float | None:
        """Seconds since the stage was started, and those of earlier attempts; clocks of two machines may differ a
        little."""
        try:
            return entry.earlier_seconds + max(0.0, self._now() - datetime.fromisoformat(entry.started).timestamp())
        except ValueError:  # a record of an older version
            return None


def work_folder(run_folder: Path, stage: str, entry: StageEntry) -> Path:
    """Where a stage works until its artifact is complete."""
    artifact = run_records.artifact_folder(run_folder, stage, entry)
    return run_records.work_folder(run_folder / stage if artifact is None else artifact)


class _RunningStage:
    def __init__(self, entry: StageEntry, work: Path, settings: Mapping[str, object], clock: Clock) -> None:
        self._work = work
        self._pace = Pace(clock)
        chart = headline_curve(entry.kind, settings)
        self._title = "" if chart is None else f"{chart.title[:1].lower()}{chart.title[1:].partition(',')[0]}"
        metric = "" if chart is None else chart.keys[0]
        tokens_of_line = functools.partial(tokens_of, settings)
        self._file = CurveFile(self._work / "content" / METRICS, metric, tokens_of_line)
        self._figures: dict[str, float] = {}
        self._has_begun = False

    def added_to(self, view: StageView) -> StageView:
        progress = Progress.read(self._work)
        if progress is None:
            return view
        self._has_begun = self._has_begun or progress.total is not None
        if not self._has_begun:  # the files may still have the figures of an earlier attempt
            self._pace.see(progress)
            pace = self._pace.per_second() or None
            return replace(view, progress=replace(progress, figures={}), steps_per_second=pace)
        steps = self._file.look()
        if steps.first is not None and steps.last is not None and steps.last[0] == progress.step:
            self._pace.see(progress, first=steps.first[0], seconds=steps.last[1] - steps.first[1])
        else:
            self._pace.see(progress)
        self._figures = progress.figures or self._figures  # sampling has none; the last ones stay
        return replace(
            view,
            progress=replace(progress, figures=self._figures),
            seconds_left=self._pace.left(),
            steps_per_second=self._pace.per_second() or None,
            tokens_per_second=steps.tokens_per_second(),
            curve=ShownCurve(title=self._title, values=steps.values) if steps.values else None,
        )


def _waits_for(entry: StageEntry, record: RunRecord) -> str:
    if entry.state != "waiting":
        return ""
    sources = dict.fromkeys(ref.removeprefix("stage:") for _, ref in entry.references if ref.startswith("stage:"))
    unfinished = [source for source in sources if source in record.stages and not record.stages[source].complete]
    if failed := [source for source in unfinished if record.stages[source].state == "failed"]:
        return f"needs {', '.join(failed)}, which failed"
    if record.state not in _GOES_ON:
        return "not started"
    return f"waits for {', '.join(unfinished)}" if unfinished else "waits for its turn"
