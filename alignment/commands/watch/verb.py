"""``align watch``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of


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
    from alignment.commands.watch.driver import Options, watch

    output, runs = runs_of(arguments, *filter(None, [arguments.run]))
    options = Options(port=arguments.port, opens_browser=arguments.opens_browser, until_done=arguments.until_done)
    return watch(console, runs[0] if runs else None, options=options, output=output)
