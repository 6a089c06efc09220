"""``python -m alignment.pipeline.sweeps.trial OUTCOME RECIPE OVERRIDE…``: a trial of a sweep as a separate process.

It is an ordinary run that waits for results of other trials. It writes its outcome to the file ``OUTCOME``. Its stdin
is a pipe that the sweep holds open; when the pipe closes because the sweep was killed, the trial stops.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from alignment.core.errors import AlignmentError, DiskError
from alignment.core.files import current_folder, explained
from alignment.core.terminal import Terminal, make_unfailing, visible
from alignment.pipeline.execute.run import run_trial
from alignment.records.sweep_record import TrialOutcome

_WIDTH = 120


def main(arguments: Sequence[str]) -> int:
    """Runs the trial; returns its exit code (alignment/core/errors.py)."""
    outcome, recipe, *overrides = arguments
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    code, error = 0, ""
    try:
        with explained(current_folder()):
            code = run_trial(recipe, overrides, console=Terminal(width=_WIDTH), wait=True)
    except AlignmentError as fault:
        code, error = fault.exit_code, str(fault)
        print(visible(error), flush=True)
    try:
        TrialOutcome(code=code, error=error).write(Path(outcome))
    except OSError:  # without the file the sweep knows only the exit code, with which it tries the trial again
        return DiskError.exit_code
    return code


def _stop_with_the_sweep() -> None:
    """Sends this process a signal to stop when the pipe closes, so that the running stage saves first."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    make_unfailing()
    sys.exit(main(sys.argv[1:]))
