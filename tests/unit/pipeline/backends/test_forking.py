"""A command that a server forks is like one that is executed, but for the seconds of importing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.core import hardware
from alignment.core.launcher_variables import RANKS
from alignment.core.locks import held, is_held
from alignment.pipeline.backends import forking
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.forking import ForkedProcess, ForkServer, fork_server
from alignment.pipeline.backends.processes import execute
from tests.living import is_living

PROBE = """
import json, os, signal, sys, time
import probe_library
print(json.dumps({
    "arguments": sys.argv[1:], "name": __name__, "environment": dict(os.environ),
    "leads": os.getsid(0) == os.getpid(), "input": sys.stdin.read(), "parent": os.getppid(),
    "imported_by": probe_library.PID, "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
}))
exec(sys.argv[1])
"""
OWN = {"_", "PWD", "SHLVL"}
"""Variables that a shell sets for every program."""


class Probe(Command):
    """Runs ``probe``, as a stage runs the package's own module without a launcher."""

    @property
    def module(self) -> str:
        return "probe"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "probe_library.py").write_text("import os\nPID = os.getpid()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[4])]))
    return tmp_path


def probe(code: str = "", **environment: str) -> Probe:
    return Probe(argv=(sys.executable, "-m", "probe", code), environment={"OMP_NUM_THREADS": "3", **environment})


@contextmanager
def serving(*modules: str) -> Iterator[ForkServer]:
    with fork_server(modules or ("probe_library",), {"OMP_NUM_THREADS": "3"}) as server:
        assert server is not None
        yield server


def begun(server: ForkServer, command: Command, output: int, keep_open: Sequence[int]) -> ForkedProcess:
    process = server.start(command, output=output, keep_open=keep_open, gives_up=lambda: False)
    assert process is not None
    return process


def printed(folder: Path, command: Command, server: ForkServer | None) -> dict[str, Any]:
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    assert execute(command, log=log, on_poll=lambda: None, grace_seconds=1, server=server) == 0
    *notes, line = log.read_text().splitlines()
    shown: dict[str, Any] = {**json.loads(line), "notes": notes}
    return shown


def test_a_forked_command_is_what_an_executed_one_is(folder: Path) -> None:
    command = probe("", RANK="0", ALIGNMENT_DEVICE="cpu", ALIGNMENT_DIVIDE_ROWS="0")
    executed = printed(folder, command, None)
    with serving() as server:
        forked = printed(folder, command, server)
    assert forked["imported_by"] == forked["parent"] != os.getpid(), "the server has imported the library"
    assert executed["parent"] == os.getpid()
    for shown in (executed, forked):
        shown["environment"] = {name: value for name, value in shown["environment"].items() if name not in OWN}
        del shown["parent"], shown["imported_by"]
    assert executed["name"] == "__main__"
    assert executed["leads"]
    assert signal.SIGUSR1 in executed["blocked"]
    assert forked == executed


def test_a_forked_command_is_not_taken_for_one_of_the_caller_s_group(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RANKS:
        monkeypatch.setenv(name, "1")
    with serving() as server:
        shown = printed(folder, probe("", RANK="0"), server)
    assert {name: shown["environment"][name] for name in RANKS if name in shown["environment"]} == {"RANK": "0"}
    assert shown["notes"] == []


@pytest.mark.parametrize(
    ("code", "expected"), [("sys.exit(75)", 75), ("raise ValueError", 1), ("os.kill(os.getpid(), 9)", -9), ("", 0)]
)
def test_exit_codes_arrive(folder: Path, code: str, expected: int) -> None:
    with serving() as server:
        log = folder / "log.txt"
        assert execute(probe(code), log=log, on_poll=lambda: None, grace_seconds=1, server=server) == expected
    assert ("ValueError" in log.read_text()) == (code == "raise ValueError")


def waits_for(file: Path) -> Probe:
    """A child that ends once there is such a file, or after a minute."""
    looks = f"while not os.path.exists({str(file)!r}) and time.monotonic() < end: time.sleep(0.01)"
    return probe(f"end = time.monotonic() + 60\n{looks}")


def test_children_run_side_by_side_and_outlive_the_server(folder: Path) -> None:
    descriptor = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    with serving() as server:
        slow = begun(server, waits_for(folder / "done"), descriptor, [])
        quick = begun(server, probe("sys.exit(4)"), descriptor, [])
        assert quick.wait() == 4
        with pytest.raises(psutil.TimeoutExpired):
            slow.wait(0)
        server._process.kill()
        assert slow.is_running()
        (folder / "done").touch()
        assert slow.wait() == 1, "nobody knows its exit code"
        assert not is_living(slow)
    os.close(descriptor)


def test_each_child_has_the_temporary_folders_of_libraries_for_itself(folder: Path) -> None:
    (folder / "probe_library.py").write_text(
        "import atexit, os, tempfile\nPID = os.getpid()\n"
        f"FOLDER = tempfile.TemporaryDirectory(dir={str(folder)!r}, prefix='made')\natexit.register(FOLDER.cleanup)\n"
    )
    shows = "print(json.dumps([probe_library.FOLDER.name, os.listdir(probe_library.FOLDER.name)]), file=sys.stderr)"
    log = folder / "log.txt"
    with serving() as server:
        for _ in range(2):
            assert execute(probe(shows), log=log, on_poll=lambda: None, grace_seconds=1, server=server) == 0
    (first, nothing), (second, _) = (json.loads(line) for line in log.read_text().splitlines()[1::2])
    assert nothing == []
    assert first != second
    assert not any(Path(name).exists() for name in (first, second))
    assert not list(folder.glob("made*")), "the server has removed its own"


def test_locks_stay_with_a_child(folder: Path) -> None:
    with serving() as server, (folder / "log.txt").open("wb") as log:
        with held(folder / "lock", wait=False) as lock:
            child = begun(server, probe("time.sleep(60)"), log.fileno(), [lock])
        assert is_held(folder / "lock")
        child.kill()
        assert child.wait() == -9
        assert not is_held(folder / "lock")


def test_what_cannot_be_forked_is_executed(folder: Path) -> None:
    with serving() as server:
        threads = printed(folder, probe("", OMP_NUM_THREADS="1"), server)
        assert threads["parent"] == os.getpid(), "the server's libraries have read the number of threads"
        assert ["fork server" in note for note in threads["notes"]] == [True], "the log says so"
        assert threads["environment"]["OMP_NUM_THREADS"] == "1"
        server._process.kill()
        assert printed(folder, probe(), server)["parent"] == os.getpid()


def test_there_is_no_server_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "count_devices", lambda: 1)
    with fork_server(["json"], {}) as server:
        assert server is None


def test_a_module_that_cannot_be_imported_is_reported_by_who_needs_it(folder: Path) -> None:
    (folder / "probe_library.py").write_text("raise RuntimeError('broken')")
    with serving() as server:
        log = folder / "log.txt"
        assert execute(probe(), log=log, on_poll=lambda: None, grace_seconds=1, server=server) == 1
    assert "RuntimeError: broken" in log.read_text()


IMPORTS = """
import importlib.util, scipy
sys.exit(40 + (importlib.util.find_spec("deepspeed") is None))
"""


def test_libraries_that_others_do_not_need_are_there_for_a_users_code(folder: Path) -> None:
    (folder / "probe_library.py").write_text("import importlib.util\nPID = importlib.util.find_spec('scipy')\n")
    with serving() as server:
        log = folder / "log.txt"
        assert execute(probe(IMPORTS), log=log, on_poll=lambda: None, grace_seconds=1, server=server) == 41
    assert json.loads(log.read_text())["imported_by"] is None, "the server's libraries were not to find it"


def test_the_wait_for_a_library_that_hangs_is_given_up(folder: Path) -> None:
    (folder / "probe_library.py").write_text("import time\ntime.sleep(600)")
    with serving() as server, (folder / "log.txt").open("wb") as log:
        assert server.start(probe(), output=log.fileno(), keep_open=[], gives_up=lambda: True) is None


def test_the_end_of_a_child_is_seen_though_the_server_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_PATIENCE", 0.2)
    with serving() as server, (folder / "log.txt").open("wb") as log:
        child = begun(server, waits_for(folder / "done"), log.fileno(), [])
        server._process.send_signal(signal.SIGSTOP)
        (folder / "done").touch()
        assert child.wait() == 1


SAVES = """
import pathlib, subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def save(*_):
    pathlib.Path({saved!r}).write_text(str(child.poll()))
    child.kill()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path({ready!r}).touch()
time.sleep(60)
"""


def test_a_stop_is_asked_of_the_worker_and_not_of_its_helpers(folder: Path) -> None:
    saved, ready = folder / "saved", folder / "ready"

    def on_poll() -> None:
        if ready.exists():
            raise KeyboardInterrupt

    code = SAVES.format(saved=str(saved), ready=str(ready))
    with serving() as server, pytest.raises(KeyboardInterrupt):
        execute(probe(code), log=folder / "log.txt", on_poll=on_poll, grace_seconds=20, server=server)
    assert saved.read_text() == "None", "its helper was still there when it saved"


def test_the_server_ends_with_its_client(folder: Path) -> None:
    with serving() as server:
        process = psutil.Process(server._process.pid)
        server._client.close()  # as the end of a killed driver does
        deadline = time.monotonic() + 20
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.status() == psutil.STATUS_ZOMBIE
