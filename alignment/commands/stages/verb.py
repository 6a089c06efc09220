"""``align stages``: the kinds of stage, a line each."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Prints them; returns the exit code."""
    for kind, stage in STAGES.items():
        console.print(f"{kind:<12} {stage.summary}", highlight=False)
    return 0
