"""``align track``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of
from alignment.config.tracking import LABELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, and the tracker to send it to."""
    parser.description = (
        "Sends the curves, tables and results of a run to a tracker. What the tracker already has is not sent again."
    )
    parser.add_argument("run", metavar="RUN", help="a run's name or its recipe's path")
    parser.add_argument("--to", required=True, choices=LABELS, help="the tracker")
    parser.add_argument(
        "--url", default="", metavar="URL", help="MLflow's server (default: the run's, then MLFLOW_TRACKING_URI)"
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Sends the run; returns the exit code."""
    from alignment.commands.track.driver import track

    output, (run,) = runs_of(arguments, arguments.run)
    return track(console, run, to=arguments.to, url=arguments.url, output=output)
