"""``align recipes``: the shipped recipes, a line each."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from alignment.config import yaml_file
from alignment.config.run import recipe_names, recipes_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Prints them; returns the exit code."""
    for name in recipe_names():
        content = yaml_file.read(recipes_folder() / f"{name}.yaml")
        console.print(f"{name:<20} {escape(content['summary'])}", highlight=False, soft_wrap=True)
    return 0
