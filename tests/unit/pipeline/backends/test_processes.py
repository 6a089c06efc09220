"""A command is run to its end, its processes hear when to stop, and none of them outlives the call."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.core.launcher_variables import RANKS
from alignment.core.locks import held, is_held
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.processes import call, execute
from tests.living import descendants_of, is_living, words_of


def python(code: str) -> Command:
    return Command(argv=(sys.executable, "-c", code), environment={"PYTHONUNBUFFERED": "1"})


def never() -> None:
    """Polled; does nothing."""


def test_output_is_appended_to_the_log_and_the_exit_code_returned(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert execute(python("print('one')"), log=log, on_poll=never, grace_seconds=1) == 0
    assert execute(python("import sys; sys.exit('two')"), log=log, on_poll=never, grace_seconds=1) == 1
    assert log.read_text() == "one\ntwo\n"
    assert execute(python("import os; os.kill(os.getpid(), 9)"), log=log, on_poll=never, grace_seconds=1) == -9


def test_a_program_on_this_terminal_has_a_worker_s_environment() -> None:
    assert call([sys.executable, "-c", "import os, sys; sys.exit(40 + int(os.environ['HF_HUB_OFFLINE']))"]) == 41


PRINTS_RANKS = f"import os; print(sorted(name for name in {RANKS} if name in os.environ))"


def test_a_process_is_not_taken_for_one_of_the_caller_s_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a container of a cluster that starts one for each machine."""
    for name in RANKS:
        monkeypatch.setenv(name, "1")
    log = tmp_path / "log.txt"
    assert execute(python(PRINTS_RANKS), log=log, on_poll=never, grace_seconds=1) == 0
    ranked = Command(argv=python(PRINTS_RANKS).argv, environment={"RANK": "0"})
    assert execute(ranked, log=log, on_poll=never, grace_seconds=1) == 0
    assert log.read_text() == "[]\n['RANK']\n"
    assert call([sys.executable, "-c", PRINTS_RANKS]) == 0
    assert capfd.readouterr().out == "[]\n"


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
time.sleep(60)
"""
STUBBORN = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({ready!r} + ".new").write_text(str(os.getpid()))
os.replace({ready!r} + ".new", {ready!r})
time.sleep(60)
"""


def unheard(_: BaseException) -> None:
    """Called at an interruption where nobody asks."""


def interrupted(
    tmp_path: Path, worker: str, *, grace_seconds: float, on_stop: Callable[[BaseException], None] = unheard
) -> float:
    """Runs a launcher with ``worker`` under it, interrupts once it is ready, and returns the seconds that took."""
    ready = tmp_path / "ready"

    def on_poll() -> None:
        if ready.exists():
            raise KeyboardInterrupt

    code = LAUNCHER.format(worker=worker.format(saved=str(tmp_path / "saved"), ready=str(ready)))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execute(python(code), log=tmp_path / "log.txt", on_poll=on_poll, on_stop=on_stop, grace_seconds=grace_seconds)
    return time.monotonic() - started


def test_an_interrupted_worker_may_save_before_the_call_returns(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    stops = []

    def acknowledge(stop: BaseException) -> None:
        stops.append((type(stop), saved.exists()))
        raise BrokenPipeError("the terminal is gone")

    interrupted(tmp_path, SAVES, grace_seconds=20, on_stop=acknowledge)
    assert stops == [(KeyboardInterrupt, False)], "an interruption is acknowledged before the worker has saved"
    assert saved.read_text() == "saved"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGUSR1, 0)]
)
def test_a_signal_to_the_launcher_alone_lets_its_worker_save(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Of SIGUSR1 the launcher hears nothing, and the worker, asked by hand, ends by itself."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in every child
    ready = tmp_path / "ready"
    sent = []

    def on_poll() -> None:
        if ready.exists() and not sent:
            # Other tests of this process may have left helpers of their own.
            launcher, worker = [
                child for child in descendants_of(os.getpid()) if str(ready) in " ".join(words_of(child))
            ]
            sent.append(launcher.send_signal(number))
            if number == signal.SIGUSR1:
                worker.terminate()

    code_of_launcher = LAUNCHER.format(worker=SAVES.format(saved=str(tmp_path / "saved"), ready=str(ready)))
    assert execute(python(code_of_launcher), log=tmp_path / "log.txt", on_poll=on_poll, grace_seconds=20) == code
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_that_comes_while_the_command_starts_lets_its_worker_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Slurm sends its warning once."""
    started = psutil.Popen

    def warned(*arguments: Any, **named: Any) -> psutil.Popen:
        process = started(*arguments, **named)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        return process

    def on_signal(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(psutil, "Popen", warned)
    saves = SAVES.replace("sleep(60)", "sleep(3)").format(saved=str(tmp_path / "saved"), ready=str(tmp_path / "ready"))
    before = signal.signal(number, on_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(python(LAUNCHER.format(worker=saves)), log=tmp_path / "log.txt", on_poll=never, grace_seconds=20)
    finally:
        signal.signal(number, before)
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_worker_hears_what_its_launcher_does_not(tmp_path: Path) -> None:
    stage = tmp_path / "sft"
    stage.mkdir()
    code = (
        "import os, pathlib, signal\nfrom alignment.core.stop_requests import stop_while_importing\n"
        "from alignment.records.worker import write_stopped_before_it_began\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        f"stop_while_importing(lambda: write_stopped_before_it_began(pathlib.Path({str(stage / 'stage.yaml')!r})))\n"
    )
    command = Command(argv=(sys.executable, "-c", code), environment={"PYTHONPATH": str(Path(__file__).parents[4])})
    assert execute(command, log=tmp_path / "log.txt", on_poll=never, grace_seconds=1) == 75
    assert json.loads((stage / "status.json").read_text())["state"] == "preempted"


def test_a_worker_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    assert interrupted(tmp_path, STUBBORN, grace_seconds=0.5) < 10
    pid = int((tmp_path / "ready").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):  # the signal was sent; the kernel may take a moment
        psutil.Process(pid).wait(timeout=10)
    assert not is_living(pid)


def test_a_command_can_keep_a_lock_after_the_one_who_took_it_let_go(tmp_path: Path) -> None:
    lock, release = tmp_path / "lock", tmp_path / "release"
    seen = []
    with held(lock, wait=False) as descriptor:
        inherited = os.dup(descriptor)

    def let_go() -> None:
        if not seen:
            os.close(inherited)
            seen.append(is_held(lock))
            release.touch()

    waits = f"import pathlib, time\nwhile not pathlib.Path({str(release)!r}).exists(): time.sleep(0.01)"
    execute(python(waits), log=tmp_path / "log.txt", on_poll=let_go, grace_seconds=1, keep_open=[inherited])
    assert seen == [True]
    assert not is_held(lock)


def test_a_command_runs_where_processes_of_others_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with /proc mounted with hidepid=1, where psutil cannot list children."""

    def hidden(*_: object, **__: object) -> list[psutil.Process]:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil.Process, "children", hidden)
    log = tmp_path / "log.txt"
    assert execute(python("import time; time.sleep(0.5)"), log=log, on_poll=never, grace_seconds=1) == 0
