"""A lock excludes, names its holder, and dies with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.errors import Busy
from alignment.locks import held, is_held


def test_a_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    lock = tmp_path / "run/lock"
    assert not is_held(lock)
    with held(lock, wait=False):
        assert is_held(lock)
        with pytest.raises(Busy, match=f"in use by process {os.getpid()}"), held(lock, wait=False):
            pytest.fail("two hold one lock")
    assert not is_held(lock)


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import os, sys, pathlib\nfrom alignment.locks import held\n"
        "with held(pathlib.Path(sys.argv[1]), wait=False): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(lock)], check=False, cwd=Path(__file__).parents[2])
    assert lock.exists()
    with held(lock, wait=False):
        pass
