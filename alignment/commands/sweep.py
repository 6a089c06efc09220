"""``align sweep``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, a sweep, and overrides for every trial."""
    parser.description = (
        "Runs a recipe once for each combination of settings and compares the results. Called again, it runs only "
        "the trials that are missing."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of your own .yaml")
    parser.add_argument("sweep", metavar="SWEEP", help="a file's name in conf/sweep, or the path of your own .yaml")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="overrides for every trial")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="number of trials to run at the same time, each with its share of the machine",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run the trials that failed again")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Runs the trials that are missing; returns the exit code."""
    from alignment.pipeline.sweeps.run import sweep

    options = {"at_once": arguments.at_once, "retry_failed": arguments.retry_failed}
    return sweep(arguments.recipe, arguments.sweep, arguments.overrides, console=console, **options)
