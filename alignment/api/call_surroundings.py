"""What the functions of the public API have in common with the command around a verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from alignment.core.errors import PREEMPTED, AlignmentError, Preempted
from alignment.core.files import explained
from alignment.core.terminal import Terminal
from alignment.core.working_folder import current_folder
from alignment.pipeline.execute.signals import INTERRUPTED

Recipe = str | os.PathLike[str]
"""The name of a shipped file, or the path of a .yaml file."""


def name_of(file: Recipe, argument: str = "recipe") -> str:
    """The name or the path that a caller gave as ``argument``.

    Raises:
        TypeError: it is something else, such as the settings themselves.
    """
    if isinstance(file, str):
        return file
    if isinstance(file, os.PathLike):
        return str(os.fspath(file))
    raise TypeError(
        f"{argument} is a {type(file).__name__}; it must be the name of a shipped {argument} or the path of a .yaml "
        "file. Settings are the overrides of a recipe, such as alignment.plan('quickstart', {'stages.dpo.beta': 0.3}); "
        "to use settings of your own alone, write them to a file with yaml.safe_dump and give its path"
    )


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turns errors of the file system into public errors, as the command does, and names arguments as Python does:
    ``at_once`` and not ``--at-once``, ``sweep`` and not ``SWEEP``."""
    try:
        with explained(current_folder()):
            yield
    except AlignmentError as error:
        if error.where.startswith("--"):
            error.where = error.where.removeprefix("--").replace("-", "_")
        elif error.where == "SWEEP":
            error.where = "sweep"
        raise


def console_of(*, quiet: bool) -> Console:
    """Standard output: a live line on a terminal, else plain lines.

    A kernel of Jupyter sets ``FORCE_COLOR``, so that rich would move the cursor in a notebook's output.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Terminal(soft_wrap=False, quiet=quiet, force_jupyter=False, force_terminal=is_terminal)


def raise_if_stopped(code: int, name: str) -> None:
    """Raises what stands for the exit code of a call that was stopped.

    Raises:
        KeyboardInterrupt: it was interrupted.
        Preempted: it was asked to stop otherwise.
    """
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == PREEMPTED:
        raise Preempted("was asked to stop and has saved", where=name, remedy="repeat the call to continue from there")
