"""``align preview``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_recipe, recipe_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides, and how much of it to show."""
    add_recipe(parser)
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--rows", type=int, default=2, help="rows of each stage (default: 2)")
    parser.add_argument("--html", metavar="FILE", help="write the rows to this HTML page as well")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows the rows; returns the exit code."""
    recipe = recipe_of(arguments)
    from alignment.commands.preview.driver import show_preview

    return show_preview(
        console, recipe, arguments.overrides, stage=arguments.stage, rows=arguments.rows, html=arguments.html
    )
