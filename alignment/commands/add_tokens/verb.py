"""``align add-tokens``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, and its new tokens."""
    parser.description = (
        "Writes a model with more special tokens, whose rows are the mean of all others, to start a run from."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="what model.source takes: bundled:NAME, path:FOLDER, hub:ORG/NAME"
    )
    parser.add_argument("tokens", metavar="TOKEN", nargs="+", help="such as '<|think|>'")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the model; returns the exit code."""
    from alignment.commands.add_tokens.driver import add_tokens

    return add_tokens(console, arguments.model, arguments.tokens, to=arguments.to)
