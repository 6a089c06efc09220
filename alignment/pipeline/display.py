"""What a user sees while stages run: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alignment.pipeline.handover import Progress as StageProgress

_PLAIN_EVERY_SECONDS = 30.0
_SHOWN_FIGURES = 3
_MARKS = {"done": "[green]✓[/]", "reused": "[cyan]=[/]", "failed": "[red]✗[/]", "stopped": "[yellow]–[/]"}


class Display(Protocol):
    """Told what happens; decides what is worth a line."""

    def note(self, text: str) -> None:
        """A step that is no stage, such as a download."""

    def begin(self, stage: str, reason: str) -> None:
        """A stage starts."""

    def update(self, progress: StageProgress) -> None:
        """The stage that runs is this far."""

    def end(self, stage: str, state: str, detail: str) -> None:
        """A stage ended: ``done``, ``reused``, ``failed`` or ``stopped``."""


def display_for(console: Console) -> Display:
    """A live bar on a terminal, plain lines elsewhere."""
    return _Live(console) if console.is_terminal else _Plain(console)


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


class _Live:
    """One bar, replaced by a line when its stage ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", markup=False, highlight=False, emoji=False, soft_wrap=True)

    def begin(self, stage: str, reason: str) -> None:
        self._bar = Progress(
            TextColumn("  {task.description:<10}"),
            TextColumn("{task.fields[phase]:<9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._bar.add_task(stage, total=None, phase="starting", figures="")
        self._bar.start()

    def update(self, progress: StageProgress) -> None:
        assert self._bar is not None, "begin() comes first"
        self._bar.update(
            self._bar.task_ids[0],
            completed=progress.step,
            total=progress.total,
            phase=progress.phase,
            figures=figures(progress),
        )

    def end(self, stage: str, state: str, detail: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._console.print(f"{_MARKS[state]} {stage:<10} {state:<7} {escape(detail)}", highlight=False)


class _Plain:
    """A line when a stage begins, changes phase, ends, and every half minute between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._phase = ""
        self._next = 0.0

    def note(self, text: str) -> None:
        self._print(text)

    def begin(self, stage: str, reason: str) -> None:
        self._stage, self._phase, self._next = stage, "", 0.0
        self._print(f"{stage}: starts ({reason})")

    def update(self, progress: StageProgress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now < self._next:
            return
        self._phase, self._next = progress.phase, now + _PLAIN_EVERY_SECONDS
        steps = f" {progress.step}/{progress.total}" if progress.total else ""
        self._print(f"{self._stage}: {progress.phase}{steps}  {figures(progress)}".rstrip())

    def end(self, stage: str, state: str, detail: str) -> None:
        self._print(f"{stage}: {state}  {detail}".rstrip())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
