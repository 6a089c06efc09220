"""What a user sees while stages run: a live view of all stages on a terminal, a line at each change elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live

from alignment.pipeline.execute.change_lines import ChangeLines
from alignment.pipeline.execute.run_table import RunTable
from alignment.pipeline.execute.run_view import RunReader, RunView

Announce = Callable[[str], None]


class Screen(Protocol):
    """Where a run is shown."""

    def note(self, text: str) -> None:
        """Prints text that stays."""

    def show(self, view: RunView) -> None:
        """Shows the run as it is now."""

    def end(self) -> None:
        """Leaves what was shown last."""


class Display:
    """Shows the files of a run on a screen, and what is not in them."""

    def __init__(self, reader: RunReader, screen: Screen) -> None:
        self._reader = reader
        self._screen = screen
        self._blocked: dict[str, str] = {}

    def note(self, text: str) -> None:
        """Shows a warning, or a step that is not a stage, such as a download."""
        self._screen.note(text)

    def wait(self, stage: str, reason: str) -> None:
        """From the next poll on, the stage waits for something that no file of the run tells; "" ends this."""
        self._blocked[stage] = reason

    def poll(self) -> RunView:
        """Shows the run as it is now; returns what is shown.

        Raises:
            ArtifactError: there is no record of the run.
        """
        view = self._reader.look(self._blocked)
        self._screen.show(view)
        return view


def announcer(console: Console) -> Announce:
    """Prints messages about what happens beside a run, such as a download."""
    indent = "  " if _is_live(console) else ""
    return lambda text: console.print(f"{indent}{text}", markup=False, highlight=False, emoji=False, soft_wrap=True)


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
