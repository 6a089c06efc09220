"""``align watch``: finds a run, and serves the page that follows it."""

from __future__ import annotations

import threading
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from alignment.commands.shared.following import FollowedRun
from alignment.commands.shared.libraries import PAGE_LIBRARIES, refuse_without
from alignment.commands.shared.listening import listening
from alignment.commands.shared.named_runs import current_run, run_folder
from alignment.core.errors import ArtifactError
from alignment.pipeline.execute.run_state import as_it_is, explanation
from alignment.records.run import FILE, RunRecord

if TYPE_CHECKING:
    from alignment.commands.shared.page_server import PageServer

POLL_SECONDS = 1.0
LINGER_SECONDS = 6.0
"""How long the page can still be read after the end of the run, so that an open one shows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of the command line."""

    port: int = 0
    opens_browser: bool = False
    until_done: bool = False


def watch(console: Console, run: str | None, *, options: Options, output: Path) -> int:
    """Serves the page of a run, or of the one that goes on, until Ctrl-C or until the run ends; returns the exit code.

    Raises:
        ConfigError: a library is missing, there is no such run, or the port is not valid.
        ArtifactError: the run's record is damaged.
        Busy: the port is taken.
    """
    refuse_without(PAGE_LIBRARIES, where="align watch", needs="the page needs")
    from alignment.commands.shared.page_server import PageServer
    from alignment.commands.watch.live_app import application

    folder = current_run(output) if run is None else run_folder(output, run)
    RunRecord.read(folder)  # a damaged record is refused before anything is served
    ended = threading.Event()
    with listening(options.port) as listener:
        server = PageServer(lambda token: application(folder, token), listener)
        end = (
            "Ctrl-C or the end of the run closes the page"
            if options.until_done
            else "Ctrl-C closes the page, not the run"
        )
        _print(console, f"watch {folder.name} at {server.address} ({end})")
        if options.opens_browser:
            webbrowser.open(server.address)
        if options.until_done:
            threading.Thread(target=_stop_at_the_end, args=(folder, server, ended), daemon=True).start()
        server.serve()
        ended.set()
    record = as_it_is(folder, RunRecord.read(folder))
    for line in (f"{folder.name}: {record.state}", *explanation(folder, record)):
        _print(console, line)
    return 0


def _stop_at_the_end(folder: Path, server: PageServer, ended: threading.Event) -> None:
    """Stops the server some seconds after the run has ended, or when its record is gone."""
    run = FollowedRun(folder)
    while not ended.wait(POLL_SECONDS):
        with suppress(ArtifactError):  # its record cannot be read for a moment (ESTALE)
            if not (folder / FILE).is_file() or not run.goes_on(run.reader.look().state):
                ended.wait(LINGER_SECONDS)
                server.stop()
                return


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
