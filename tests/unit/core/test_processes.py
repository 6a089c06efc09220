"""A lock excludes and names its holder; children of a process are found; processes end with their work's exit code."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from alignment.core import locks
from alignment.core.child_processes import children_of, kill_all
from alignment.core.errors import ArtifactError, Busy, ConfigError
from alignment.core.locks import held, is_held, last_host
from tests.living import is_living, wait_until


def busy(lock: Path) -> Busy:
    with pytest.raises(Busy) as caught, held(lock, wait=False):
        pytest.fail("two hold one lock")
    return caught.value


def test_a_second_holder_is_told_who_has_it_and_where(tmp_path: Path) -> None:
    lock = tmp_path / "run/lock"
    assert not is_held(lock)
    assert last_host(lock) == ""
    with held(lock, wait=False):
        assert is_held(lock)
        assert last_host(lock) == socket.gethostname()
        for content, words, commands in (
            (None, f"process {os.getpid()}", f"; `ps -fp {os.getpid()}` shows it, `kill {os.getpid()}` stops it"),
            ("12 node7", "process 12 on node7", "; on node7, `ps -fp 12` shows it, `kill 12` stops it"),
            ("", "process unknown", ""),
            ("nonsense", "process nonsense", ""),
        ):
            if content is not None:
                lock.write_text(content)
            error = busy(lock)
            assert words in error.message
            assert error.remedy == f"wait for it, or stop it{commands}"
    assert not is_held(lock)


def test_whoever_only_looks_keeps_nobody_out_and_a_look_that_does_not_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with lock.open("rb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        end = threading.Timer(0.05, fcntl.flock, (looker, fcntl.LOCK_UN))
        end.start()
        try:
            with held(lock, wait=False):
                assert is_held(lock)
        finally:
            end.join()  # before the file is closed under it
        fcntl.flock(looker, fcntl.LOCK_SH)
        monkeypatch.setattr(locks, "_LOOK_SECONDS", 0.02)
        busy(lock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="locks") as caught, held(tmp_path / "lock", wait=False):
        pytest.fail("it is not locked")
    assert caught.value.where == str(tmp_path)
    assert "output=FOLDER" in caught.value.remedy
    with pytest.raises(ConfigError, match="locks"):
        is_held(tmp_path / "lock")


@pytest.mark.parametrize("command", ["sleep 60", ""])
def test_the_process_that_goes_on_is_named_where_the_one_that_took_the_lock_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    lock = tmp_path / "lock"
    code = (
        "import os, pathlib, subprocess, sys\nfrom alignment.core.locks import held\n"
        "with held(pathlib.Path(sys.argv[1]), wait=False) as descriptor:\n"
        "    heir = subprocess.Popen(['sleep', '60'], pass_fds=[descriptor], stdout=subprocess.DEVNULL)\n"
        "    print(heir.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)"
    )
    argv = [sys.executable, "-c", code, str(lock)]
    taker = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    heir = int(taker.communicate()[0])
    wait_until(psutil.Process(heir).cmdline)  # a process has none for a moment while it starts a program
    if not command:
        monkeypatch.setattr(psutil.Process, "cmdline", lambda _: [])
    try:
        error = busy(lock)
    finally:
        os.kill(heir, 9)
    assert (f"process {heir} ({command})," if command else f"process {heir},") in error.message
    assert f"although {taker.pid}," in error.message
    assert error.remedy.endswith(f"; `ps -fp {heir}` shows it, `kill {heir}` stops it")
    wait_until(lambda: not is_held(lock))


@pytest.mark.parametrize("kind", ["a link", "a link to nothing", "a folder", "a pipe"])
def test_what_is_no_lock_file_is_neither_written_to_nor_followed(kind: str, tmp_path: Path) -> None:
    """Somebody who may write to the folder could have another file of the user's emptied."""
    lock, other = tmp_path / "lock", tmp_path / "other"
    if kind == "a link":
        other.write_text("precious")
    if kind.startswith("a link"):
        lock.symlink_to(other)
    elif kind == "a folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(ArtifactError, match="a lock must be a regular file"), held(lock, wait=False):
        pytest.fail("it was taken for a lock")
    with pytest.raises(ArtifactError, match="a lock must be a regular file"):
        is_held(lock)
    assert other.exists() == (kind == "a link")
    assert kind != "a link" or other.read_text() == "precious"


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
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        yield parent.pid, int(parent.stdout.readline())


def ids(*, recursive: bool) -> set[int]:
    return {child.pid for child in children_of(psutil.Process(), recursive=recursive)}


def test_children_are_found_where_others_are_hidden(family: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As with /proc mounted with hidepid=1, where psutil cannot list children."""

    def hidden(*_: object, **__: object) -> list[psutil.Process]:
        raise psutil.AccessDenied(1)

    with subprocess.Popen([sys.executable, "-c", ""]) as program:
        process = psutil.Process(program.pid)
        program.wait()
    assert children_of(process) == [], "a process that has ended has none"
    seen = ids(recursive=False), ids(recursive=True)
    monkeypatch.setattr(psutil.Process, "children", hidden)
    assert (ids(recursive=False), ids(recursive=True)) == seen
    child, grandchild = family
    assert child in seen[0]
    assert grandchild in seen[1] - seen[0]


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


LATE = """
import atexit, os, sys
class Late:
    def __del__(self):
        os.abort()
late = Late()
atexit.register(lambda: print("handled", end=""))
print("printed", end=" ")
"""
"""A program that is aborted while the interpreter is taken down, as by a native thread that waits for its lock."""


def ended(program: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def test_what_happens_while_an_interpreter_is_taken_down_changes_no_exit_code() -> None:
    end = "from alignment.core.child_processes import end_process\nend_process(5)\n"
    assert ended(LATE + end) == (5, "printed handled"), "exit handlers run, and output is written"
    assert ended(LATE + "sys.exit(5)\n")[0] == -6, "what it is for"


def test_every_process_that_loads_the_libraries_ends_so() -> None:
    """The others load neither torch nor data sets, or, in an environment of its own, nothing of this project."""
    package = Path(__file__).parents[3] / "alignment"
    programs = {
        str(file.relative_to(package)): text
        for file in package.rglob("*.py")
        if 'if __name__ == "__main__":' in (text := file.read_text(encoding="utf-8"))
    }
    ending = ("    end_process(", "    run_as_program(")
    usual = {name for name, text in programs.items() if not any(call in text for call in ending)}
    assert usual == {
        "cli.py",
        "fork_server.py",
        "commands/export/gguf_form/llama_script.py",
        "engines/engine_environment.py",
        "engines/keeper_process.py",
        "pipeline/sources/bundled_model.py",
        "pipeline/sweeps/trial.py",
    }
