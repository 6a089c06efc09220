"""``align compare``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two runs or more."""
    parser.description = (
        "Shows the settings that differ, the arms side by side, and how far the primary metric differs from the "
        "first run, paired by prompt."
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="names of runs, or their recipes' paths; the others are compared with the first",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page with the curves in shared charts and with the answers"
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Compares them; returns the exit code."""
    from alignment.commands.compare.driver import compare

    output, runs = runs_of(arguments, *arguments.runs)
    compare(console, output, runs, html=arguments.html)
    return 0
