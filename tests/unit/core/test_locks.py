"""A lock excludes, names its holder, and dies with it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from alignment.core import locks
from alignment.core.errors import ArtifactError, Busy, ConfigError
from alignment.core.locks import held, is_held, last_host
from tests.patience import wait_until


def test_a_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    lock = tmp_path / "run/lock"
    assert not is_held(lock)
    with held(lock, wait=False):
        assert is_held(lock)
        with pytest.raises(Busy, match=f"in use by process {os.getpid()}") as caught, held(lock, wait=False):
            pytest.fail("two hold one lock")
        expected = f"wait for it, or stop it; `ps -fp {os.getpid()}` shows it, `kill {os.getpid()}` stops it"
        assert caught.value.remedy == expected
    assert not is_held(lock)


def test_a_lock_says_on_which_machine_it_was_taken_last(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert last_host(lock) == ""
    with held(lock, wait=False):
        assert last_host(lock) == socket.gethostname()
    assert last_host(lock) == socket.gethostname()


def test_whoever_only_looks_keeps_nobody_out(tmp_path: Path) -> None:
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


def test_a_look_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_LOOK_SECONDS", 0.02)
    lock = tmp_path / "lock"
    lock.touch()
    with lock.open("rb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        with pytest.raises(Busy), held(lock, wait=False):
            pytest.fail("another process has it")


def test_a_wait_for_a_lock_shows_that_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.01)
    calls: list[int] = []
    with ExitStack() as other:
        other.enter_context(held(tmp_path / "lock", wait=False))

        def waiting() -> None:
            calls.append(len(calls))
            if len(calls) == 3:
                other.close()

        with held(tmp_path / "lock", wait=True, waiting=waiting):
            assert is_held(tmp_path / "lock")
    assert calls == [0, 1, 2]


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import os, sys, pathlib\nfrom alignment.core.locks import held\n"
        "with held(pathlib.Path(sys.argv[1]), wait=False): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(lock)], check=False, cwd=Path(__file__).parents[3])
    assert lock.exists()
    with held(lock, wait=False):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="does not support locks") as caught, held(tmp_path / "lock", wait=False):
        pytest.fail("it is not locked")
    assert caught.value.where == str(tmp_path)
    assert "output=FOLDER" in caught.value.remedy
    with pytest.raises(ConfigError, match="does not support locks"):
        is_held(tmp_path / "lock")


def test_a_lock_that_may_only_be_read_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    real = os.open

    def read_only(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *mode)

    with held(lock, wait=False):
        monkeypatch.setattr(os, "open", read_only)
        assert is_held(lock)
    assert not is_held(lock)


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
    taker = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    heir = int(taker.communicate()[0])
    wait_until(psutil.Process(heir).cmdline)  # a process has none for a moment while it starts a program
    if not command:
        monkeypatch.setattr(psutil.Process, "cmdline", lambda _: [])
    try:
        with pytest.raises(Busy) as caught, held(lock, wait=False):
            pytest.fail("two hold one lock")
    finally:
        os.kill(heir, 9)
    name = f"process {heir} ({command})" if command else f"process {heir}"
    expected = f"in use by {name}, which is still running although {taker.pid}, the process that started it, has ended"
    assert caught.value.message == expected
    assert caught.value.remedy.endswith(f"; `ps -fp {heir}` shows it, `kill {heir}` stops it")


def test_a_holder_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock, wait=False):
        lock.write_text("12 node7")
        with pytest.raises(Busy, match="in use by process 12 on node7") as caught, held(lock, wait=False):
            pytest.fail("two hold one lock")
        assert caught.value.remedy.endswith("; on node7, `ps -fp 12` shows it, `kill 12` stops it")


@pytest.mark.parametrize("content", ["", "nonsense"])
def test_a_holder_whose_id_is_not_known_comes_with_no_command(tmp_path: Path, content: str) -> None:
    lock = tmp_path / "lock"
    with held(lock, wait=False):
        lock.write_text(content)
        with pytest.raises(Busy, match=f"process {content or 'unknown'}") as caught, held(lock, wait=False):
            pytest.fail("two hold one lock")
        assert caught.value.remedy == "wait for it, or stop it"


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
