"""Runs the worker of a command in a separate process on this terminal, and says so if the process is killed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from alignment.core.deadline import KILLED_BY, KILLED_SECONDS
from alignment.core.errors import ModelError, StageError
from alignment.core.files import partial_folder
from alignment.pipeline.backends import processes


def run_worker(argv: Sequence[str], *, verb: str) -> int:
    """The exit code of a worker of ``align VERB``, which has printed its own errors.

    Raises:
        ModelError: it was killed because a chat template did not end.
        StageError: it was killed otherwise, so it printed nothing.
    """
    code = processes.call(argv)
    if code == -KILLED_BY:
        raise ModelError(
            f"the chat template ran for more than {KILLED_SECONDS:g} s in one step",
            where=verb,
            remedy="set model.chat_template=chatml, or path:FILE of another template",
        )
    if code < 0:
        raise StageError(
            f"its process was ended by signal {-code}",
            where=verb,
            remedy="run it again; signal 9 often means that the machine ran out of memory",
        )
    return code


def write_folder(argv: Sequence[str], target: Path, *, verb: str) -> int:
    """Like ``run_worker`` for one that writes the folder ``target``; a worker that was killed leaves no part of it."""
    try:
        return run_worker(argv, verb=verb)
    finally:
        shutil.rmtree(partial_folder(target), ignore_errors=True)
