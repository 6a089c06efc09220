"""``align add-tokens``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, and its new tokens."""
    parser.description = (
        "Writes a copy of a model with additional special tokens, from which a run can start. Their embeddings are "
        "the mean of all others."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model, written as in model.source: bundled:NAME, path:FOLDER or hub:ORG/NAME"
    )
    parser.add_argument("tokens", metavar="TOKEN", nargs="+", help="such as '<|think|>'")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the model; returns the exit code."""
    from alignment.commands.add_tokens.driver import add_tokens

    return add_tokens(console, arguments.model, arguments.tokens, to=arguments.to)
