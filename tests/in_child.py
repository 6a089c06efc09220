"""Work in a process that is forked from this one, so that nothing is imported anew."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import IO


def in_child(work: Callable[[], int], sink: IO[bytes] | None = None) -> int:
    """The exit code of ``work`` in a process of its own, which prints into ``sink``."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if sink is not None:
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        # pytest's are other files than these two.
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  nothing may go on in the parent's code
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
