"""What the processes that verbs start have in common."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

from alignment.core.child_processes import end_process
from alignment.core.errors import AlignmentError
from alignment.core.terminal import complain, make_unfailing

Main = Callable[..., int]


def reported(main: Main) -> Main:
    """Prints an error of ours that ``main`` raises, and returns its exit code."""

    @functools.wraps(main)
    def call(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except AlignmentError as error:
            complain(error)
            return error.exit_code

    return call


def silence_libraries() -> None:
    """Only errors of transformers, PEFT and torch are printed."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b.*")


def run_as_program(main: Callable[[], int]) -> None:
    """Runs the ``main`` of a module that was called as a program, and ends its process."""
    make_unfailing()
    end_process(main())
