"""``align doctor``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.config.data import SourceConfig
from alignment.data.formats import FORMATS

_SOURCE = ("format", "split", "subset")
"""Options that are settings of the source."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A data file, how to read it, and another one to compare it with."""
    parser.description = (
        "Says what a data file looks like, what each kind of stage can make of it, and what is wrong in which rows."
    )
    parser.add_argument(
        "data", metavar="DATA", help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION"
    )
    parser.add_argument("--format", choices=sorted(FORMATS), help="read it as this; else the columns tell")
    parser.add_argument("--split", help="of a hub's data set (default: train)")
    parser.add_argument("--subset", help="of a hub's data set, where it has several")
    parser.add_argument(
        "--against", metavar="DATA", help="say which rows ask what this file asks: of an evaluation, say"
    )


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Explains the file; returns the exit code."""
    from alignment.commands.doctor.driver import show_diagnosis

    chosen = {name: getattr(arguments, name) for name in _SOURCE if getattr(arguments, name)}
    return show_diagnosis(console, SourceConfig(source=arguments.data, **chosen), against=arguments.against)
