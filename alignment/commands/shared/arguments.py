"""Arguments that several verbs take, each with the same words."""

from __future__ import annotations

import argparse
from pathlib import Path

from alignment.config.store import recipe_names
from alignment.core.errors import ConfigError


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe, which ``recipe_of`` wants to be there, and overrides of it."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help=f"{', '.join(recipe_names())}, or the path of your own .yaml"
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="such as stages.dpo.beta=0.3 or output=FOLDER"
    )


def recipe_of(arguments: argparse.Namespace) -> str:
    """The recipe that was named.

    Raises:
        ConfigError: none was; lists the shipped ones.
    """
    if arguments.recipe is None:
        raise ConfigError(
            f"which recipe? shipped: {', '.join(recipe_names())}",
            remedy=f"such as: align {arguments.verb} quickstart",
        )
    return str(arguments.recipe)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where runs are looked for."""
    parser.add_argument(
        "--output", default=".", metavar="FOLDER", help="the folder that holds runs/ (default: this one)"
    )


def output_of(arguments: argparse.Namespace) -> Path:
    """That folder, absolute."""
    return Path(arguments.output).expanduser().absolute()
