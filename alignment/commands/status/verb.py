"""``align status``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One run, or all."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="a run's name or its recipe's path; without it, all runs are listed"
    )
    parser.add_argument(
        "--follow", action="store_true", help="show RUN, or the current run, until it ends; Ctrl-C does not end the run"
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows how they stand; returns the exit code."""
    from alignment.commands.status.driver import show_status
    from alignment.commands.status.follower import follow

    output, runs = runs_of(arguments, *filter(None, [arguments.run]))
    run = runs[0] if runs else None
    if arguments.follow:
        follow(console, output, run)
        return 0
    show_status(console, output, run)
    return 0
