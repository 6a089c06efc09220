"""Children of a process, also on a machine that hides the processes of others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from alignment.core.child_processes import children_of

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
child.communicate()
"""


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
