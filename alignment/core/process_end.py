"""The end of a process that has loaded the libraries of a stage."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code, after its exit handlers have run and its output is written.

    The interpreter is not taken down. Native threads of libraries may still wait for its lock then (those of pyarrow
    do), and such a thread aborts the process: exit code -6 after everything went well (apache/arrow issue 34314).
    """
    with suppress(Exception):  # a handler that fails prints why
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk, or a stream that was closed
            stream.flush()
    os._exit(code)
