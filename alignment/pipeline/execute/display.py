"""What a user sees while stages run: a live view of all stages on a terminal, a line at each change elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from alignment.core.errors import PREEMPTED, ArtifactError, Preempted, StageError
from alignment.core.terminal import say
from alignment.core.wording import duration, time_taken
from alignment.pipeline.execute.run_table import RunTable, figure, progress_line, speed
from alignment.pipeline.execute.run_view import KILLED, STOPPED, RunReader, RunView, StageView
from alignment.pipeline.execute.signals import Terminated
from alignment.records.run import Attempts
from alignment.records.worker import Progress, Status

_PARTS = 10
"""Of the steps of a phase; a line is printed when another of these parts is done."""

_ENDED_BEFORE = ("done", "failed", STOPPED)
"""States in which an earlier call left a stage; a reused one was found by this call."""


class ChangeLines:
    """Prints a line when a stage starts, enters a phase for the first time, has done another tenth of its steps, waits
    for something else than before, or ends."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print_line = print_line
        self._printed: set[str] = set()
        self._states: dict[str, str] = {}
        self._phases: dict[str, set[str]] = {}
        self._parts: dict[str, set[object]] = {}
        self._last: dict[str, object] = {}

    def note(self, text: str) -> None:
        """Prints something that is no change of a stage, such as a warning."""
        if text not in self._printed:
            self._printed.add(text)
            self._print_line(text)

    def show(self, view: RunView) -> None:
        """Prints what is new in this view. In the first one, stages that ended before are not new."""
        if not self._states:
            self._states = {stage.name: stage.state for stage in view.stages if stage.state in _ENDED_BEFORE}
        for stage in view.stages:
            self._show_stage(stage)

    def end(self) -> None:
        """Every line stays."""

    def _show_stage(self, stage: StageView) -> None:
        before, self._states[stage.name] = self._states.get(stage.name, "waiting"), stage.state
        if stage.state != before:
            for seen in (self._phases, self._parts, self._last):
                seen.pop(stage.name, None)
            begins = stage.state == "running"
            self.note(f"{stage.name}: starts ({stage.reason})" if begins else _end(stage))
        if stage.blocked:
            self.note(f"{stage.name}: {stage.blocked}")
        if stage.progress is not None and self._is_new(stage.name, stage.progress):
            left = "" if stage.seconds_left is None else f"{duration(stage.seconds_left)} left"
            done = f"{stage.name}: {progress_line(stage.progress)}"
            self.note(f"{', '.join(filter(None, [done, speed(stage), left]))}  {figure(stage)}".rstrip())

    def _is_new(self, stage: str, progress: Progress) -> bool:
        """Whether the phase is new, or it has done another tenth; without a total, lines come at 10 and 100.

        Phases that take turns count the same steps (sampling and training); only the first of them counts then."""
        digits = len(str(progress.step)) if progress.step else 0
        part = (progress.total, progress.step * _PARTS // progress.total if progress.total else digits)
        phases, parts = self._phases.setdefault(stage, set()), self._parts.setdefault(stage, set())
        is_new = progress.phase not in phases
        is_new = is_new or ((progress.phase, part) not in parts and part != self._last.get(stage))
        phases.add(progress.phase)
        parts.add((progress.phase, part))
        if is_new:
            self._last[stage] = part
        return is_new


def _end(stage: StageView) -> str:
    words = [] if stage.state == "reused" else [time_taken(stage.seconds, stage.attempts)]  # another call's
    if stage.state not in (STOPPED, KILLED, "failed", "waiting"):
        words.append(stage.artifact)
    state = STOPPED if stage.state == "waiting" else stage.state
    return f"{stage.name}: {'  '.join([state, *filter(None, words)])}"


Announce = Callable[[str], None]


class Display:
    """Shows the files of a run on a screen, and what is not in them."""

    def __init__(self, reader: RunReader, screen: ChangeLines | _LiveScreen) -> None:
        self._reader, self._screen = reader, screen
        self._blocked: dict[str, str] = {}

    def note(self, text: str) -> None:
        """Shows a warning, or a step that is not a stage, such as a download."""
        self._screen.note(text)

    def wait(self, stage: str, reason: str) -> None:
        """From the next poll on, the stage waits for something that no file of the run tells; "" ends this."""
        self._blocked[stage] = reason

    def poll(self) -> RunView:
        """Shows the run as it is now; returns what is shown. Raises ArtifactError: there is no record of the run."""
        view = self._reader.look(self._blocked)
        self._screen.show(view)
        return view


def announcer(console: Console) -> Announce:
    """Prints messages about what happens beside a run, such as a download."""
    indent = "  " if _is_live(console) else ""
    return lambda text: say(console, f"{indent}{text}")


@contextmanager
def showing(console: Console, reader: RunReader) -> Iterator[Display]:
    """Shows a run while the block runs: a live view on a terminal, which stays as it is at the end; lines elsewhere."""
    screen = _LiveScreen(console) if _is_live(console) else ChangeLines(announcer(console))
    try:
        yield Display(reader, screen)
    finally:
        screen.end()


def _is_live(console: Console) -> bool:
    return console.is_terminal and console.is_interactive


class _LiveScreen:
    """Draws the run again at each look, below what was printed. No thread draws: a fork or a signal finds none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._announce = announcer(console)
        self._live = Live(console=console, auto_refresh=False)
        self._view: RunView | None = None

    def note(self, text: str) -> None:
        self._announce(text)

    def show(self, view: RunView) -> None:
        self._view = view
        self._live.start()
        self._live.update(RunTable(view, rows=self._console.height - 1), refresh=True)

    def end(self) -> None:
        if self._view is not None:
            self._live.update(RunTable(self._view))
        self._live.stop()


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
    Raises StageError: the last attempts were all stopped before the stage had stored anything."""
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
