"""What a user sees while stages run: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from alignment.records.worker import Progress as StageProgress

_PLAIN_EVERY_SECONDS = 30.0
_SHOWN_FIGURES = 3
_MANY_A_SECOND = 100.0
"""Steps a second from which their number is shown: rows that are tokenised, say, but not steps of training."""
_BAR_WIDTHS = (20, 8)
_NARROW = 110
"""Width of a terminal, in columns, below which the bar is shorter, so that its line does not wrap."""

Clock = Callable[[], float]
"""Seconds that only go up."""
_MARKS = {"done": "[green]✓[/]", "reused": "[cyan]=[/]", "failed": "[red]✗[/]", "stopped": "[yellow]–[/]"}


class Display(Protocol):
    """Is notified of what happens, and decides what to print."""

    def note(self, text: str) -> None:
        """A step that is not a stage, such as a download."""

    def begin(self, stage: str, reason: str) -> None:
        """A stage starts."""

    def update(self, progress: StageProgress) -> None:
        """The running stage has made this progress."""

    def end(self, stage: str, state: str, detail: str) -> None:
        """A stage ended: ``done``, ``reused``, ``failed`` or ``stopped``."""


def display_for(console: Console, clock: Clock = time.monotonic) -> Display:
    """A live bar on a terminal, plain lines elsewhere."""
    return _Live(console, clock) if console.is_terminal else _Plain(console, clock)


def duration(seconds: float | None) -> str:
    """``41 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def figures(progress: StageProgress) -> str:
    """The first figures of a stage, ``loss 1.83  reward 0.41``."""
    return "  ".join(f"{name} {value:.3g}" for name, value in list(progress.figures.items())[:_SHOWN_FIGURES])


def steps(progress: StageProgress) -> str:
    """``12/57``, ``12`` if the total is unknown, or nothing before the first step."""
    if progress.total:
        return f"{progress.step:,}/{progress.total:,}"
    return f"{progress.step:,}" if progress.step else ""


class _Pace:
    """Estimates how long a stage's remaining steps take, from all steps since it was first seen.

    A window of seconds would not contain two steps of PPO, whose update and sampling take minutes. Phases that count
    the same steps, such as sampling and training, share an estimate.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._total: int | None = None
        self._first = self._latest = 0
        self._began = self._reached = 0.0

    def see(self, progress: StageProgress) -> None:
        """Records the stage's progress now."""
        now = self._clock()
        if progress.total != self._total or progress.step < self._latest:
            self._total, self._first, self._began = progress.total, progress.step, now
            self._latest, self._reached = progress.step, now
        elif progress.step > self._latest:
            self._latest, self._reached = progress.step, now

    def left(self) -> float | None:
        """Seconds, or None before a step has been timed."""
        done = self._latest - self._first
        if not self._total or not done:
            return None
        seconds = (self._total - self._latest) * (self._reached - self._began) / done
        return max(0.0, seconds - (self._clock() - self._reached))

    def shown(self) -> str:
        """``, 7,546/s`` if there are many steps a second, else nothing."""
        seconds = self._reached - self._began
        pace = (self._latest - self._first) / seconds if seconds > 0 else 0.0
        return f", {pace:,.0f}/s" if pace >= _MANY_A_SECOND else ""


class _Times(ProgressColumn):
    """``0:18 elapsed, 1:02 left``; it keeps counting while the stage writes no progress."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._pace = pace

    def render(self, task: Task) -> Text:
        """Called at each refresh."""
        left = self._pace.left()
        elapsed = f"{_clock_face(task.elapsed or 0.0)} elapsed{self._pace.shown()}"
        return Text(elapsed if left is None else f"{elapsed}, {_clock_face(left)} left")


def _clock_face(seconds: float) -> str:
    """``1:02``, or ``1:01:02`` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Live:
    """One bar, replaced by a line when its stage ends."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._bar: Progress | None = None
        self._pace = _Pace(clock)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", markup=False, highlight=False, emoji=False, soft_wrap=True)

    def begin(self, stage: str, reason: str) -> None:
        self._pace = _Pace(self._clock)
        self._bar = Progress(
            TextColumn("  {task.description:<10}"),
            TextColumn("{task.fields[phase]:<9}"),
            BarColumn(bar_width=_BAR_WIDTHS[self._console.width < _NARROW]),
            TextColumn("{task.fields[steps]}"),
            _Times(self._pace),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            get_time=self._clock,
        )
        self._bar.add_task(stage, total=None, phase="starting", steps="", figures="")
        self._bar.start()

    def update(self, progress: StageProgress) -> None:
        assert self._bar is not None, "begin() comes first"
        self._pace.see(progress)
        task = self._bar.tasks[0]
        self._bar.update(
            task.id,
            completed=progress.step,
            total=progress.total,
            phase=progress.phase,
            steps=steps(progress),
            figures=figures(progress) or task.fields["figures"],  # sampling has none; the last ones stay
        )

    def end(self, stage: str, state: str, detail: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._console.print(f"{_MARKS[state]} {stage:<10} {state:<7} {escape(detail)}", highlight=False)


class _Plain:
    """Prints a line when a stage begins, enters a phase for the first time, and ends; in between at most one every half
    minute, if the stage has progressed."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._stage = ""
        self._pace = _Pace(clock)
        self._phases: set[str] = set()
        self._printed: tuple[int, int | None] | None = None
        self._figures = ""
        self._next = 0.0

    def note(self, text: str) -> None:
        self._print(text)

    def begin(self, stage: str, reason: str) -> None:
        self._stage, self._pace = stage, _Pace(self._clock)
        self._phases, self._printed, self._figures, self._next = set(), None, "", 0.0
        self._print(f"{stage}: starts ({reason})")

    def update(self, progress: StageProgress) -> None:
        self._pace.see(progress)
        self._figures = figures(progress) or self._figures
        position = (progress.step, progress.total)
        if progress.phase in self._phases and (position == self._printed or self._clock() < self._next):
            return
        self._phases.add(progress.phase)
        self._printed, self._next = position, self._clock() + _PLAIN_EVERY_SECONDS
        left = self._pace.left()
        remaining = self._pace.shown() + ("" if left is None else f", {duration(left)} left")
        self._print(
            f"{self._stage}: {progress.phase} {steps(progress)}".rstrip() + f"{remaining}  {self._figures}".rstrip()
        )

    def end(self, stage: str, state: str, detail: str) -> None:
        self._print(f"{stage}: {state}  {detail}".rstrip())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
