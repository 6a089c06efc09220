"""The user's command, many times over: stages are forked from one process that has imported the libraries already.

``python -m tests.e2e.forked`` reads command lines from stdin, as JSON, and prints their exit codes, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import peft  # noqa: F401
import trl  # noqa: F401

from alignment import cli, launcher, worker
from alignment.launcher import Command


def execute(command: Command, *, log: Path, **_: Any) -> int:
    """In place of the launcher's: its last word is the stage file; one process, which nobody polls or interrupts."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with log.open("ab") as sink:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(sink.fileno(), stream.fileno())
    os.environ.update(command.environment)
    try:
        code = worker.main(Path(command.argv[-1]))
    except BaseException:  # noqa: BLE001  nothing may go on in the parent's code
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    launcher.execute = execute
    codes = [cli.main(line) for line in json.load(sys.stdin)]
    print(json.dumps(codes))
