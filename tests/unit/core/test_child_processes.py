"""Children of a process, also on a machine that hides the processes of others, and their end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from alignment.core.child_processes import children_of, kill_all
from tests.living import is_living

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
child.communicate()
"""

SHARING = """
from multiprocessing.shared_memory import SharedMemory
import sys
print(SharedMemory(create=True, size=8).name, flush=True)
sys.stdin.read()
"""
"""A process with shared memory, which a child of it removes: Python's resource tracker."""
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """The ids of a child and of its child."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        yield parent.pid, int(parent.stdout.readline())


def ids(*, recursive: bool) -> set[int]:
    return {child.pid for child in children_of(psutil.Process(), recursive=recursive)}


def test_children_are_found_where_others_are_hidden(family: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As with /proc mounted with hidepid=1, where psutil cannot list children."""

    def hidden(*_: object, **__: object) -> list[psutil.Process]:
        raise psutil.AccessDenied(1)

    seen = ids(recursive=False), ids(recursive=True)
    monkeypatch.setattr(psutil.Process, "children", hidden)
    assert (ids(recursive=False), ids(recursive=True)) == seen
    child, grandchild = family
    assert child in seen[0]
    assert grandchild in seen[1] - seen[0]


def test_a_process_that_has_ended_has_no_children() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as program:
        process = psutil.Process(program.pid)
        program.wait()
    assert children_of(process) == []


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no folder shows the machine's shared memory")
@pytest.mark.parametrize("starting", [False, True])
def test_killed_processes_leave_no_shared_memory(starting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they are killed while the one that would remove it is ``starting``, and has no command line yet."""
    cmdline, looked_at = psutil.Process.cmdline, list[int]()

    def at_first_empty(process: psutil.Process) -> list[str]:
        looked_at.append(process.pid)
        return [] if starting and looked_at.count(process.pid) == 1 else cmdline(process)

    monkeypatch.setattr(psutil.Process, "cmdline", at_first_empty)
    with subprocess.Popen([sys.executable, "-c", SHARING], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        memory = SHARED_MEMORY / program.stdout.readline().decode().strip()
        assert memory.exists()
        leader = psutil.Process(program.pid)
        family = [leader, *children_of(leader, recursive=True)]
        assert len(family) == 2
        kill_all(lambda: [process for process in family if is_living(process)])
        assert not any(is_living(process) for process in family)
    assert not memory.exists()
