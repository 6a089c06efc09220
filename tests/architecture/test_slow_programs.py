"""The programs that no ordinary test runs can still be started: each prints its help, all that it imports imported."""

from __future__ import annotations

import runpy
import sys
import tempfile

import pytest

from tests.living import in_child


@pytest.mark.parametrize(
    "program",
    [
        "tests.proofs",
        "tests.matrix",
        "tests.faults",
        "tests.same",
        "benchmarks",
        "benchmarks.gpu_check",
        "tests.browser",
    ],
)
def test_a_slow_program_starts(program: str) -> None:
    def asked_for_help() -> int:
        sys.argv = [program, "--help"]
        for name in (program, f"{program}.__main__"):  # another test may have imported it
            sys.modules.pop(name, None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return 0

    with tempfile.TemporaryFile() as sink:
        code = in_child(asked_for_help, sink)
        sink.seek(0)
        printed = sink.read().decode()
    assert code == 0, printed
    assert "usage" in printed
