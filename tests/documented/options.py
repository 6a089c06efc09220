"""The options of each verb of ``align``, as its own parser declares them."""

from __future__ import annotations

import argparse
from functools import cache

from alignment import cli


@cache
def options_of(verb: str) -> frozenset[str]:
    """``--rows`` and the like."""
    parser = argparse.ArgumentParser()
    cli.load(verb).add_arguments(parser)
    return frozenset(name for action in parser._actions for name in action.option_strings if name.startswith("--"))


def all_options() -> frozenset[str]:
    """Those of every verb."""
    return frozenset().union(*(options_of(verb) for verb in cli.VERBS), {"--help", "--version"})
