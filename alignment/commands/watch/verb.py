"""``align watch``: serves the report of a run while it is running."""

from __future__ import annotations

import argparse
import threading
import webbrowser
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of
from alignment.commands.shared.following import FollowedRun, current_run, run_folder
from alignment.commands.shared.listening import listening, refuse_without_page_libraries
from alignment.core.errors import ArtifactError
from alignment.pipeline.execute.run_state import as_it_is, explanation
from alignment.records.run import FILE, RunRecord

if TYPE_CHECKING:
    from alignment.commands.shared.page_server import PageServer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, and how long it is shown."""
    parser.description = (
        "Serves the report of a run on this machine (127.0.0.1) while the run is in progress. The page follows the "
        "run and changes nothing in it. Ctrl-C closes the page, not the run."
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="a run's name or its recipe's path (default: the run in progress)"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: any free port)")
    parser.add_argument("--open", dest="opens_browser", action="store_true", help="open the page in a browser")
    parser.add_argument("--until-done", action="store_true", help="end when the run has ended")
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Serves the page until the user or the run ends it; returns the exit code."""
    output, runs = runs_of(arguments, *filter(None, [arguments.run]))
    options = {name: getattr(arguments, name) for name in ("port", "opens_browser", "until_done")}
    return watch(console, runs[0] if runs else None, output=output, **options)


POLL_SECONDS = 1.0
LINGER_SECONDS = 6.0
"""How long the page can still be read after the end of the run, so that an open one shows it."""


def watch(
    console: Console,
    run: str | None,
    *,
    output: Path,
    port: int = 0,
    opens_browser: bool = False,
    until_done: bool = False,
) -> int:
    """Serves the page of a run, or of the one that goes on, until Ctrl-C or until the run ends; returns the exit code.
    Raises ConfigError, ArtifactError, Busy."""
    refuse_without_page_libraries(where="align watch", needs="the page needs")
    from alignment.commands.shared.page_server import PageServer
    from alignment.commands.watch.live_app import application

    folder = current_run(output) if run is None else run_folder(output, run)
    RunRecord.read(folder)  # a damaged record is refused before anything is served
    ended = threading.Event()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with listening(port) as listener:
        server = PageServer(lambda token: application(folder, token), listener)
        end = "or the end of the run closes the page" if until_done else "closes the page, not the run"
        say(f"watch {folder.name} at {server.address} (Ctrl-C {end})")
        if opens_browser:
            webbrowser.open(server.address)
        if until_done:
            threading.Thread(target=_stop_at_the_end, args=(folder, server, ended), daemon=True).start()
        server.serve()
        ended.set()
    record = as_it_is(folder, RunRecord.read(folder))
    for line in (f"{folder.name}: {record.state}", *explanation(folder, record)):
        say(line)
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
