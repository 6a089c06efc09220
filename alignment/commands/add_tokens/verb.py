"""``align add-tokens``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, and its new tokens."""
    parser.description = (
        "Writes a copy of a model with additional tokens, from which a run can start. Their embeddings are the mean of "
        "all others. They are control tokens, which only a chat template can write: in the text of a row they are "
        "ordinary text, as are all control tokens. With --in-text they are tokens in the text of rows and answers too."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model, written as in model.source: bundled:NAME, path:FOLDER or hub:ORG/NAME"
    )
    parser.add_argument("tokens", metavar="TOKEN", nargs="+", help="such as '<|think|>'")
    parser.add_argument(
        "--in-text", action="store_true", help="add tokens that the text of rows contains (default: control tokens)"
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the model; returns the exit code."""
    from alignment.commands.add_tokens.driver import add_tokens

    return add_tokens(console, arguments.model, arguments.tokens, to=arguments.to, in_text=arguments.in_text)
