"""``align run`` with the worker of these tests, for a test that gives it a terminal."""

from __future__ import annotations

import sys

from alignment.core.terminal import Terminal
from alignment.pipeline.execute.run import run
from tests.unit.pipeline.test_run import fake

if __name__ == "__main__":
    sys.exit(run("quickstart", sys.argv[1:], console=Terminal(soft_wrap=False), command_for=fake))
