"""``align doctor``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.data.formats import FORMATS

_SOURCE = ("format", "split", "subset")
"""Options that are settings of the source."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A data file, how to read it, and another one to compare it with."""
    parser.description = (
        "Shows the format of a data file, which kinds of stage can use it, and which rows are faulty and why."
    )
    parser.add_argument(
        "data", metavar="DATA", help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="a setting of the data, as in a recipe: columns='{prompt: my_question}' or placeholders='{name: Ada}'",
    )
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="read the rows in this format (default: the columns decide)"
    )
    parser.add_argument("--split", help="the split of DATA, if that is on a hub (default: train)")
    parser.add_argument("--subset", help="the subset of DATA, if that is on a hub and has several")
    parser.add_argument(
        "--against",
        metavar="DATA",
        help="also list the rows whose prompts or texts overlap with this file, such as the data of an evaluation",
    )
    parser.add_argument(
        "--against-split", metavar="SPLIT", help="the split of --against, if that is on a hub (default: train)"
    )
    parser.add_argument("--against-subset", metavar="SUBSET", help="the subset of --against, if it has several")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Explains the file; returns the exit code."""
    from alignment.commands.doctor.driver import show_diagnosis
    from alignment.commands.doctor.source_settings import against_of, source_of

    chosen = {name: getattr(arguments, name) for name in _SOURCE if getattr(arguments, name)}
    data = source_of(arguments.data, chosen, arguments.overrides)
    against = against_of(arguments.against, split=arguments.against_split, subset=arguments.against_subset)
    return show_diagnosis(console, data, against=against)
