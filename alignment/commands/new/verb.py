"""``align new``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.config.new_recipe import FIRST, FROM_PAIRS, SCORER, Question

_DEFAULT_OUT = "recipe.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data files, a model, and answers to what it would ask."""
    parser.description = (
        "Looks at data files and writes a commented recipe for them. On a terminal it asks for what it cannot know; "
        "elsewhere, options must answer these questions."
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION",
    )
    parser.add_argument(
        "--model", metavar="SOURCE", help="the model, written as in model.source (default: the bundled small model)"
    )
    parser.add_argument(
        "--out", default=_DEFAULT_OUT, metavar="FILE", help=f"a file that does not exist yet (default: {_DEFAULT_OUT})"
    )
    parser.add_argument(
        "--heldout", metavar="FILE", help="prompts to evaluate on (default: a part of the data, copied to a file)"
    )
    parser.add_argument(
        "--columns",
        metavar="{NAME: YOURS}",
        help="columns of FILE that have other names, such as '{label: good}', as in a recipe's data.columns",
    )
    for question in (FROM_PAIRS, FIRST):
        parser.add_argument(f"--{question.name}", choices=list(question.choices), help=_help(question))
    parser.add_argument(
        f"--{SCORER.name}",
        metavar="SOURCE",
        help="a scorer of answers: the evaluation's metric, and also PPO's reward if the recipe has PPO",
    )
    parser.add_argument("--device", metavar="GPU", help="the GPU to train on, such as h100 (default: this machine)")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the recipe; returns the exit code."""
    from alignment.commands.new.driver import Options, new_recipe

    answers = {question.name: getattr(arguments, question.name.replace("-", "_")) for question in _QUESTIONS}
    options = Options(
        model=arguments.model,
        heldout=arguments.heldout,
        device=arguments.device,
        columns=arguments.columns,
        answers={name: answer for name, answer in answers.items() if answer is not None},
    )
    return new_recipe(console, arguments.files, out=arguments.out, options=options)


_QUESTIONS = (FROM_PAIRS, FIRST, SCORER)


def _help(question: Question) -> str:
    return f"the answer to: {question.text}"
