"""``align run``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_recipe, add_verify, recipe_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides, all of it or one stage."""
    add_recipe(parser)
    add_verify(parser)
    parser.add_argument("--stage", help="run only this stage, with existing results of earlier stages")
    parser.add_argument("--wait", action="store_true", help="wait if another process is working on the same result")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    recipe = recipe_of(arguments)
    from alignment.pipeline.execute.run import run

    options = {"only": arguments.stage, "wait": arguments.wait, "verified": arguments.verify}
    return run(recipe, arguments.overrides, console=console, **options)
