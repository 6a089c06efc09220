"""A command is run to its end, executed or forked by a server, and its processes hear when to stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.core import hardware
from alignment.core.child_processes import RANKS
from alignment.core.locks import held, is_held
from alignment.pipeline.backends import forking
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.forking import ForkedProcess, ForkServer, fork_server
from alignment.pipeline.backends.processes import call, execute
from tests.living import descendants_of, is_living, wait_until, words_of

ROOT = Path(__file__).parents[3]


def python(code: str, **environment: str) -> Command:
    return Command(argv=(sys.executable, "-c", code), environment={"PYTHONUNBUFFERED": "1", **environment})


Executed = Callable[..., int]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


@pytest.fixture
def executed(log: Path) -> Executed:
    def run(command: Command, *, grace_seconds: float = 1, **options: Any) -> int:
        return execute(command, **{"log": log, "on_poll": lambda: None, "grace_seconds": grace_seconds, **options})

    return run


def test_output_is_appended_to_the_log_and_the_exit_code_returned(executed: Executed, log: Path) -> None:
    for code, expected in (
        ("print('one')", 0),
        ("import sys; sys.exit('two')", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ):
        assert executed(python(code)) == expected
    assert log.read_text() == "one\ntwo\n"


PRINTS_RANKS = f"import os; print(sorted(name for name in {RANKS} if name in os.environ))"


def test_a_process_has_a_worker_s_environment_and_is_not_taken_for_one_of_the_caller_s_group(
    executed: Executed, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a container of a cluster that starts one for each machine."""
    for name in RANKS:
        monkeypatch.setenv(name, "1")
    assert executed(python(PRINTS_RANKS)) == executed(python(PRINTS_RANKS, RANK="0")) == 0
    assert log.read_text() == "[]\n['RANK']\n"
    assert call([sys.executable, "-c", PRINTS_RANKS]) == 0
    assert capfd.readouterr().out == "[]\n"
    assert call([sys.executable, "-c", "import os, sys; sys.exit(40 + int(os.environ['HF_HUB_OFFLINE']))"]) == 41


# A launcher that dies at SIGTERM, and a worker in a session of its own that takes a moment to save.
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", {worker!r}], start_new_session=True)
"""
SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path({saved!r}).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path({ready!r}).touch()
time.sleep({seconds})
"""
STUBBORN = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({ready!r} + ".new").write_text(str(os.getpid()))
os.replace({ready!r} + ".new", {ready!r})
time.sleep({seconds})
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tmp_path / "saved"


def launcher(folder: Path, worker: str, seconds: int = 60) -> Command:
    code = worker.format(saved=str(folder / "saved"), ready=str(folder / "ready"), seconds=seconds)
    return python(LAUNCHER.format(worker=code))


def interrupt_at(file: Path) -> Callable[[], None]:
    def on_poll() -> None:
        if file.exists():
            raise KeyboardInterrupt

    return on_poll


def test_an_interrupted_worker_may_save_first(executed: Executed, saved: Path, tmp_path: Path) -> None:
    stops = []

    def acknowledge(stop: BaseException) -> None:
        stops.append((type(stop), saved.exists()))
        raise BrokenPipeError("the terminal is gone")

    interrupts = interrupt_at(tmp_path / "ready")
    with pytest.raises(KeyboardInterrupt):
        executed(launcher(tmp_path, SAVES), on_poll=interrupts, on_stop=acknowledge, grace_seconds=20)
    assert stops == [(KeyboardInterrupt, False)], "an interruption is acknowledged before the worker has saved"
    assert saved.read_text() == "saved"


def test_a_worker_that_does_not_stop_is_killed_after_the_grace(executed: Executed, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        executed(launcher(tmp_path, STUBBORN), on_poll=interrupt_at(tmp_path / "ready"), grace_seconds=0.5)
    assert time.monotonic() - started < 10
    pid = int((tmp_path / "ready").read_text())
    wait_until(lambda: not is_living(pid))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, -signal.SIGHUP), (signal.SIGUSR1, 0)])
def test_a_signal_to_the_launcher_alone_lets_its_worker_save(
    executed: Executed, saved: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Of SIGUSR1 the launcher hears nothing, and the worker, asked by hand, ends by itself."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in every child
    ready = tmp_path / "ready"
    sent = []

    def on_poll() -> None:
        if ready.exists() and not sent:
            # Other tests of this process may have left helpers of their own.
            process, worker = [
                child for child in descendants_of(os.getpid()) if str(ready) in " ".join(words_of(child))
            ]
            sent.append(process.send_signal(number))
            if number == signal.SIGUSR1:
                worker.terminate()

    assert executed(launcher(tmp_path, SAVES), on_poll=on_poll, grace_seconds=20) == code
    assert saved.read_text() == "saved"


def test_a_signal_while_the_command_starts_lets_its_worker_save(
    executed: Executed, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends its warning once."""
    started = psutil.Popen

    def warned(*arguments: Any, **named: Any) -> psutil.Popen:
        process = started(*arguments, **named)
        wait_until((tmp_path / "ready").exists)
        os.kill(os.getpid(), signal.SIGUSR1)
        return process

    def on_signal(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(psutil, "Popen", warned)
    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            executed(launcher(tmp_path, SAVES, seconds=3), grace_seconds=20)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert saved.read_text() == "saved"


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
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "probe_library.py").write_text("import os\nPID = os.getpid()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path / "probe_library.py"


def probe(code: str = "", **environment: str) -> Probe:
    return Probe(argv=(sys.executable, "-m", "probe", code), environment={"OMP_NUM_THREADS": "3", **environment})


@contextmanager
def serving() -> Iterator[ForkServer]:
    with fork_server(("probe_library",), {"OMP_NUM_THREADS": "3"}) as server:
        assert server is not None
        yield server


def begun(server: ForkServer, command: Command, log: Path, keep_open: Sequence[int] = ()) -> ForkedProcess:
    with log.open("ab") as output:
        process = server.start(command, output=output.fileno(), keep_open=keep_open, gives_up=lambda: False)
    assert process is not None
    return process


def printed(executed: Executed, log: Path, command: Command, server: ForkServer | None) -> dict[str, Any]:
    log.unlink(missing_ok=True)
    assert executed(command, server=server) == 0
    *notes, line = log.read_text().splitlines()
    shown: dict[str, Any] = {**json.loads(line), "notes": notes}
    return shown


def test_a_forked_command_is_what_an_executed_one_is(
    executed: Executed, log: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RANKS:
        monkeypatch.setenv(name, "1")
    with serving() as server:
        command = probe("", RANK="0", ALIGNMENT_DEVICE="cpu", ALIGNMENT_DIVIDE_ROWS="0")
        plain, forked = (printed(executed, log, command, where) for where in (None, server))
    assert forked["imported_by"] == forked["parent"] != os.getpid(), "the server has imported the library"
    assert plain["parent"] == os.getpid()
    for shown in (plain, forked):
        shown["environment"] = {name: value for name, value in shown["environment"].items() if name not in OWN}
        del shown["parent"], shown["imported_by"]
    assert (plain["name"], plain["leads"], signal.SIGUSR1 in plain["blocked"]) == ("__main__", True, True)
    ranks = {name: value for name, value in forked["environment"].items() if name in RANKS}
    assert ranks == {"RANK": "0"}, "it is not one of the caller's group"
    assert forked == plain


IMPORTS = """
import importlib.util, scipy
sys.exit(40 + (importlib.util.find_spec("deepspeed") is None))
"""


def test_exit_codes_arrive(executed: Executed, log: Path, library: Path) -> None:
    with serving() as server:
        for code, expected in (("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", -9), ("raise ValueError", 1)):
            assert executed(probe(code), server=server) == expected
        assert "ValueError" in log.read_text()
        assert executed(probe(IMPORTS), server=server) == 41, "what others do not need is there for a user's code"


def waits_for(file: Path) -> Probe:
    looks = f"while not os.path.exists({str(file)!r}) and time.monotonic() < end: time.sleep(0.01)"
    return probe(f"end = time.monotonic() + 60\n{looks}")


def test_children_run_side_by_side_and_outlive_the_server(library: Path, log: Path, tmp_path: Path) -> None:
    with serving() as server:
        slow = begun(server, waits_for(tmp_path / "done"), log)
        assert begun(server, probe("sys.exit(4)"), log).wait() == 4
        with pytest.raises(psutil.TimeoutExpired):
            slow.wait(0)
        server._process.kill()
        assert slow.is_running()
        (tmp_path / "done").touch()
        assert slow.wait() == 1, "nobody knows its exit code"
        assert not is_living(slow)


def test_locks_stay_with_a_child(library: Path, log: Path, tmp_path: Path) -> None:
    with serving() as server:
        with held(tmp_path / "lock", wait=False) as lock:
            child = begun(server, probe("time.sleep(60)"), log, [lock])
        assert is_held(tmp_path / "lock")
        child.kill()
        assert child.wait() == -9
        assert not is_held(tmp_path / "lock")


def test_what_cannot_be_forked_is_executed(
    executed: Executed, log: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        threads = printed(executed, log, probe("", OMP_NUM_THREADS="1"), server)
        assert threads["parent"] == os.getpid(), "the server's libraries have read the number of threads"
        assert ["fork server" in note for note in threads["notes"]] == [True], "the log says so"
        assert threads["environment"]["OMP_NUM_THREADS"] == "1"
        server._process.kill()
        assert printed(executed, log, probe(), server)["parent"] == os.getpid()
        monkeypatch.setattr(hardware, "count_devices", lambda: 1)
        with fork_server(["json"], {}) as beside_a_gpu:
            assert beside_a_gpu is None


def test_a_library_that_hangs_is_given_up_and_a_broken_one_reported(
    executed: Executed, library: Path, log: Path
) -> None:
    library.write_text("raise RuntimeError('broken')")
    with serving() as server:
        assert executed(probe(), server=server) == 1
    assert "RuntimeError: broken" in log.read_text()
    library.write_text("import time\ntime.sleep(600)")
    with serving() as server, log.open("wb") as output:
        assert server.start(probe(), output=output.fileno(), keep_open=[], gives_up=lambda: True) is None


def test_the_server_ends_with_its_client(library: Path) -> None:
    with serving() as server:
        process = psutil.Process(server._process.pid)
        server._client.close()  # as the end of a killed driver does
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)


def test_the_end_of_a_child_is_seen_though_the_server_hangs(
    library: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        monkeypatch.setattr(forking, "_PATIENCE", 0.2)
        child = begun(server, waits_for(tmp_path / "done"), log)
        server._process.send_signal(signal.SIGSTOP)
        (tmp_path / "done").touch()
        assert child.wait() == 1
