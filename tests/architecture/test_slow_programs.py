"""The programs that no ordinary test runs can still be started: each prints its help, all that it imports imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "program",
    ["tests.proofs", "tests.matrix", "tests.mutations", "benchmarks", "benchmarks.gpu_check", "tests.browser"],
)
def test_a_slow_program_starts(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", program, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
