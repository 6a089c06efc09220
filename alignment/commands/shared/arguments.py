"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from alignment.config.store import recipe_names
from alignment.core.errors import ConfigError

_RECIPE = ".yaml"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds a recipe, which ``recipe_of`` requires, and overrides."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help=f"{', '.join(recipe_names())}, or the path of your own .yaml"
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="such as stages.dpo.beta=0.3 or output=FOLDER"
    )


def recipe_of(arguments: argparse.Namespace) -> str:
    """The given recipe.

    Raises:
        ConfigError: no recipe was given; the error lists the shipped ones.
    """
    if arguments.recipe is None:
        raise ConfigError(
            f"which recipe? shipped: {', '.join(recipe_names())}",
            remedy=f"such as: align {arguments.verb} quickstart",
        )
    return str(arguments.recipe)


def add_policies(parser: argparse.ArgumentParser) -> None:
    """Adds ``result`` and ``arms``, which ``PolicyFinder`` takes."""
    parser.add_argument(
        "result", metavar="RUN", help="a run's name or its recipe's path, RUN/STAGE, or an artifact's folder"
    )
    parser.add_argument(
        "--arm",
        dest="arms",
        action="append",
        default=[],
        metavar="ARM",
        help="a stage of the run, base, or RUN/STAGE of another; repeat it for several (default: the last policy)",
    )


def run_of(argument: str) -> str:
    """The run that an argument names: by its name, or by the path of the recipe from which ``align run`` named it.

    ``./mine.yaml`` becomes ``mine``, ``./mine.yaml/dpo`` becomes ``mine/dpo``; anything else stays as it is.

    Raises:
        ConfigError: the recipe does not compose.
    """
    stem, suffix, stage = argument.rpartition(_RECIPE)
    recipe = f"{stem}{suffix}"
    if not suffix or stage[:1] not in ("", "/") or not Path(recipe).expanduser().is_file():
        return argument
    from alignment.pipeline.plan.compose import compose

    return f"{compose(str(Path(recipe).expanduser().absolute()), []).tree['name']}{stage}"


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the folder in which runs are."""
    parser.add_argument(
        "--output", default=".", metavar="FOLDER", help="the folder that contains runs/ (default: the current folder)"
    )


def output_of(arguments: argparse.Namespace) -> Path:
    """The output folder as an absolute path."""
    return Path(arguments.output).expanduser().absolute()
