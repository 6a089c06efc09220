"""``align plan``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_recipe, recipe_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides."""
    add_recipe(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows the plan; returns the exit code."""
    recipe = recipe_of(arguments)
    from alignment.commands.plan.driver import show

    show(console, recipe, arguments.overrides)
    return 0
