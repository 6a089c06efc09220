"""The programs that no ordinary test runs can still be started: each prints its help, all that it imports imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAMS = ("tests.proofs", "tests.matrix", "tests.mutations", "benchmarks", "tests.browser")
EACH_IN_A_CHILD = """\
import os, runpy, sys
import tests.proofs.__main__  # imports nearly all that the others import, which takes seconds
for program in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, program
    else:
        sys.argv = [program, "--help"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def test_slow_programs_start() -> None:
    argv = [sys.executable, "-c", EACH_IN_A_CHILD, *PROGRAMS]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(PROGRAMS)
