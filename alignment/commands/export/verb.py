"""``align export``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, output_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A result, and where and how to write it."""
    parser.add_argument("result", metavar="RESULT", help="an artifact's folder, or RUN/STAGE such as quickstart/dpo")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("model", "adapter"),
        default="model",
        help="adapters merged into whole weights (default), or the one adapter on its base",
    )
    parser.add_argument(
        "--max-gap",
        type=float,
        default=0.01,
        metavar="NATS",
        help="mean KL a token that merging may cause by rounding (default: 0.01)",
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the folder; returns the exit code."""
    from alignment.commands.export.driver import export

    return export(
        console,
        arguments.result,
        to=arguments.to,
        form=arguments.form,
        max_gap=arguments.max_gap,
        output=output_of(arguments),
    )
