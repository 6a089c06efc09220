"""``python -m tests.simulated_device -m pytest tests/unit/models``: runs Python with a simulated CUDA device. The
arguments are Python's own. Its child processes have the device too. Exit code: that of what runs, or 2 where no device
can be simulated."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.simulated_device.build import built, missing

SITE = Path(__file__).parent / "site"
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    paths = [str(SITE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    if lacking := missing():
        print(lacking, file=sys.stderr)
        sys.exit(2)
    built()
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
