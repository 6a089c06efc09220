"""``align schema``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

FILES = ("recipe", "sweep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kind of file to describe."""
    parser.description = (
        "Prints the JSON Schema of recipes or of sweeps, with which an editor completes and checks them as you type."
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", choices=FILES, default=FILES[0], help="recipe (default) or sweep"
    )
    parser.add_argument(
        "--beside",
        metavar="FOLDER",
        help="the folder of your recipes; the schema then also allows the files in its adapter/, launch/, stage/ "
        "and so on",
    )


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Prints the schema; returns the exit code."""
    from alignment.commands.schema.driver import show_schema

    return show_schema(console, arguments.file, beside=arguments.beside)
