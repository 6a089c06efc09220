"""``align export``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.export.export_options import add_form_arguments, options_of
from alignment.commands.shared.arguments import add_output, runs_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A result, and where and how to write it."""
    parser.add_argument(
        "result",
        metavar="RESULT",
        help="an artifact's folder, RUN/STAGE such as quickstart/dpo, or an adapter that PEFT saved (path:FOLDER, "
        "hub:ORG/NAME)",
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    add_form_arguments(parser)
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the folder; returns the exit code."""
    from alignment.commands.export.driver import export

    output, (result,) = runs_of(arguments, arguments.result)
    return export(console, result, to=arguments.to, options=options_of(arguments), output=output)
