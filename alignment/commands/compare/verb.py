"""``align compare``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, output_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two runs or more."""
    parser.description = (
        "Settings that differ, arms side by side, and differences in the primary metric from the first run, "
        "prompt by prompt."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names of runs; the others are compared with the first")
    parser.add_argument("--html", metavar="FILE", help="write a page with curves laid over each other and answers, too")
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Compares them; returns the exit code."""
    from alignment.commands.compare.driver import compare

    compare(console, output_of(arguments), arguments.runs, html=arguments.html)
    return 0
