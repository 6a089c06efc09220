"""What the functions of the public API have in common with the command around a verb."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from alignment.core.errors import PREEMPTED, Preempted
from alignment.core.files import explained
from alignment.core.terminal import Terminal
from alignment.core.working_folder import current_folder
from alignment.pipeline.execute.signals import INTERRUPTED

Recipe = str | os.PathLike[str]
"""The name of a shipped file, or the path of a .yaml file."""


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turns errors of the file system into public errors, as the command does."""
    with explained(current_folder()):
        yield


def console_of(*, quiet: bool) -> Console:
    """Standard output as it is at each line: a notebook and ``redirect_stdout`` replace it. Lines are plain text in a
    notebook, too."""
    return Terminal(soft_wrap=False, quiet=quiet, force_jupyter=False)


def raise_if_stopped(code: int, name: str) -> None:
    """Raises what stands for the exit code of a call that was stopped.

    Raises:
        KeyboardInterrupt: it was interrupted.
        Preempted: it was asked to stop otherwise.
    """
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == PREEMPTED:
        raise Preempted("was asked to stop and has saved", where=name, remedy="the same call continues from there")
