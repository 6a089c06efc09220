"""``align track``: sends a recorded run to a tracker."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.arguments import add_output, run_worker, runs_of
from alignment.commands.shared.following import run_folder
from alignment.config.faults import refuse
from alignment.config.rules import TRACKING_URL
from alignment.config.run import LABELS, TrackingConfig, with_only
from alignment.core.errors import ConfigError
from alignment.pipeline.plan import tracking_checks
from alignment.records.run import RunRecord


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
    output, (run,) = runs_of(arguments, arguments.run)
    return track(console, run, to=arguments.to, url=arguments.url, output=output)


def track(console: Console, run: str, *, to: str, url: str, output: Path) -> int:
    """Sends the run of this name under ``output``; returns the exit code. An empty ``url`` is that of the run. Raises
    ConfigError, StageError."""
    folder = run_folder(output, run)
    if not TRACKING_URL.holds(url):
        raise ConfigError(f"not an address of a server; allowed: {TRACKING_URL.allowed}", where="--url")
    url = url or RunRecord.read(folder).config.get("tracking", {}).get("mlflow_url", "")
    refuse(list(tracking_checks.faults(with_only(TrackingConfig(), to, mlflow_url=url))))
    argv = [sys.executable, "-m", "alignment.commands.track.worker", str(folder), "--to", to]
    return run_worker([*argv, "--url", url] if url else argv, verb="track")
