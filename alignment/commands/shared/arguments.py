"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from alignment.config.run import recipe_names
from alignment.core.deadline import KILLED_BY, KILLED_SECONDS
from alignment.core.errors import ConfigError, ModelError, StageError
from alignment.core.files import partial_folder
from alignment.pipeline.backends import processes

_RECIPE = ".yaml"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds a recipe, which ``recipe_of`` requires, and overrides."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", nargs="?", help=f"{', '.join(recipe_names())}, or the path of your own .yaml")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="such as stages.dpo.beta=0.3 or output=FOLDER")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Adds the option that compares results with their hashes."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all files of results to reuse and compare them with their hashes (default: compare sizes)",
    )


def recipe_of(arguments: argparse.Namespace) -> str:
    """The given recipe. Raises ConfigError: no recipe was given; the error lists the shipped ones."""
    if arguments.recipe is None:
        remedy = f"such as: align {arguments.verb} quickstart"
        raise ConfigError(f"which recipe? shipped: {', '.join(recipe_names())}", remedy=remedy)
    return str(arguments.recipe)


def add_policies(parser: argparse.ArgumentParser) -> None:
    """Adds ``result`` and ``arms``, which ``PolicyFinder`` takes."""
    add = parser.add_argument
    add(
        "result",
        metavar="RUN",
        help="a run's name or its recipe's path, RUN/STAGE, an artifact's folder, or an adapter that PEFT saved "
        "(path:FOLDER, hub:ORG/NAME)",
    )
    add(
        "--arm",
        dest="arms",
        action="append",
        default=[],
        metavar="ARM",
        help="a stage of the run, base, or RUN/STAGE of another; repeat it for several (default: the last policy)",
    )


def runs_of(arguments: argparse.Namespace, *named: str) -> tuple[Path, list[str]]:
    """The folder that contains ``runs/``, and the names of runs that are given by name, or by the path of the recipe
    from which ``align run`` named them: ``./mine.yaml`` becomes ``mine``, ``./mine.yaml/dpo`` becomes ``mine/dpo``. The
    folder is ``--output``, else the ``output`` of the recipe, else the current one. Raises ConfigError."""
    located = [_run_of(argument) for argument in named]
    runs = [run for run, _ in located]
    if arguments.output is not None:
        return _absolute(arguments.output), runs
    folders = sorted({folder for _, folder in located if folder is not None})
    if len(folders) > 1:
        message = f"the recipes have different output folders: {', '.join(map(str, folders))}"
        remedy = "name the folder that contains all of the runs with --output"
        raise ConfigError(message, where=", ".join(named), remedy=remedy)
    return (folders[0] if folders else Path.cwd()), runs


def _run_of(argument: str) -> tuple[str, Path | None]:
    """The run that an argument names, and the folder that contains ``runs/`` if the argument is a recipe."""
    stem, suffix, stage = argument.rpartition(_RECIPE)
    recipe = f"{stem}{suffix}"
    if not suffix or stage[:1] not in ("", "/") or not Path(recipe).expanduser().is_file():
        return argument, None
    from alignment.config.run import RunConfig
    from alignment.pipeline.plan.compose import compose

    tree = compose(str(Path(recipe).expanduser().absolute()), []).tree
    return f"{tree['name']}{stage}", _absolute(str(tree.get("output", RunConfig(name=stem).output)))


def _absolute(folder: str) -> Path:
    return Path(folder).expanduser().absolute()


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the folder in which runs are; ``runs_of`` reads it."""
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="the folder that contains runs/ (default: the recipe's output, if RUN is a recipe, or the current folder)",
    )


def run_worker(argv: Sequence[str], *, verb: str) -> int:
    """The exit code of a worker of ``align VERB``, which has printed its own errors. Raises ModelError, StageError."""
    code = processes.call(argv)
    if code == -KILLED_BY:
        message = f"the chat template ran for more than {KILLED_SECONDS:g} s in one step"
        remedy = "set model.chat_template=chatml, or path:FILE of another template"
        raise ModelError(message, where=verb, remedy=remedy)
    if code < 0:
        remedy = "run it again; signal 9 often means that the machine ran out of memory"
        raise StageError(f"its process was ended by signal {-code}", where=verb, remedy=remedy)
    return code


def write_folder(argv: Sequence[str], target: Path, *, verb: str) -> int:
    """Like ``run_worker`` for one that writes the folder ``target``; a worker that was killed leaves no part of it."""
    try:
        return run_worker(argv, verb=verb)
    finally:
        shutil.rmtree(partial_folder(target), ignore_errors=True)
