"""``align stages``: the kinds of stage, a line each, with the package of those that are not ours."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.stages.registry import OURS, registered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Prints them, also those that cannot be used, with the reason; returns the exit code."""
    for row in registered().values():
        origin = "" if row.origin == OURS else f" ({row.origin})"
        line = f"{row.kind.summary}{origin}" if row.kind is not None else row.problem
        console.print(f"{row.name:<12} {line}", markup=False, highlight=False, soft_wrap=True)
    return 0
