"""``align status``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, output_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One run, or all."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's name; without it, all runs are listed")
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows how they stand; returns the exit code."""
    from alignment.commands.status.driver import show_status

    show_status(console, output_of(arguments), arguments.run)
    return 0
