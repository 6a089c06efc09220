"""Servers end with their owner, however that ends, and what ends them is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from alignment.core.errors import StageError
from alignment.core.locks import is_held
from alignment.engines.keeper_process import lock_file
from alignment.engines.server_process import KEY, PORT, Keeper, ServerCommand, ServerProcess
from tests.living import is_living, wait_until

SHARED_MEMORY = Path("/dev/shm")
PARENT = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(os.path.join(sys.argv[2], "pids"), "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = sys.argv[3].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server with a child in a session of its own; both pids are in a file."""
OWNER = """
import sys, time
from pathlib import Path
from alignment.engines.server_process import Keeper
from tests.unit.engines.test_server_process import started
folder = Path(sys.argv[1])
keeper = Keeper()
server = started(keeper, folder)
(folder / "scratch").write_text(str(keeper.folder))
time.sleep(600)
"""
STUBBORN = """
import os, signal, sys, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=8)
open(sys.argv[1], "w").write(f"{os.getpid()} {memory.name}\\n")
time.sleep(60)
"""
"""A server that ignores a request to end; a file has its pid and the name of its shared memory."""
IMPATIENT = """
import sys
from pathlib import Path
from alignment.engines import keeper_process
keeper_process.GRACE_SECONDS = 0.2
keeper_process.main(Path(sys.argv[1]))
"""
"""The keeper's program, with little time for a server to end by itself."""


def command(folder: Path) -> ServerCommand:
    return ServerCommand(name="the server", argv=[sys.executable, "-c", PARENT, PORT, str(folder), KEY])


def started(keeper: Keeper, folder: Path) -> ServerProcess:
    return ServerProcess(keeper, command(folder), log=folder / "log", where="sampling", start_timeout=30)


def program(text: str) -> ServerCommand:
    return ServerCommand(name="the server", argv=[sys.executable, "-c", text], smaller="lower sampling.cache_gb")


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def gone(folder: Path) -> bool:
    return not any(is_living(pid) for pid in pids(folder))


def test_a_server_answers_with_its_key_and_leaves_nothing_when_it_is_closed(tmp_path: Path) -> None:
    with Keeper() as keeper:
        server = started(keeper, tmp_path)
        with urllib.request.urlopen(server.url) as reply:
            assert reply.read().decode() == server.key
        assert len(server.key) == 32
        assert not server.has_ended
        assert not gone(tmp_path)
        scratch, port = keeper.folder, server.port
    assert gone(tmp_path)
    assert not scratch.exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)])
    try:
        wait_until(lambda: (tmp_path / "scratch").exists() and (tmp_path / "scratch").read_text() != "")
        scratch = Path((tmp_path / "scratch").read_text())
        assert scratch.exists()
        assert not gone(tmp_path)
    finally:
        owner.send_signal(number)
        owner.wait()
    wait_until(lambda: gone(tmp_path) and not scratch.exists())


def test_what_a_killed_keeper_left_is_removed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Keeper() as killed, Keeper() as living:
        for keeper in (killed, living):
            wait_until(lambda keeper=keeper: is_held(lock_file(keeper.folder)))
        psutil.Process(int((killed.folder / "pid").read_text())).kill()
        wait_until(lambda: not killed.is_alive)
        recent, foreign = tmp_path / "alignment-server-recent", tmp_path / "alignment-server-foreign"
        recent.mkdir()
        foreign.mkdir()  # without a lock, whoever made it
        (recent / "keeper.lock").touch()
        for folder in (killed.folder, living.folder, foreign):
            os.utime(folder, (0, 0))
        with Keeper() as third:
            left = {folder.name for folder in tmp_path.iterdir()}
            assert left == {folder.name for folder in (living.folder, recent, foreign, third.folder)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ValueError('no such model')", "exit code 1: ValueError: no such model"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9: it was killed, or there was not enough memory"),
        ("raise SystemExit(3)", "the server ended with exit code 3"),
    ],
)
def test_a_server_that_ends_says_why(tmp_path: Path, text: str, reason: str) -> None:
    with Keeper() as keeper, pytest.raises(StageError, match=reason) as raised:
        ServerProcess(keeper, program(text), log=tmp_path / "log", where="stages.ppo.sampling", start_timeout=30)
    assert raised.value.where == "stages.ppo.sampling"
    assert str(tmp_path / "log") in raised.value.remedy
    assert ("cache_gb" in raised.value.remedy) == ("memory" in reason)


def test_a_port_that_was_taken_meanwhile_is_tried_again(tmp_path: Path) -> None:
    first = tmp_path / "first"
    text = (
        f"import pathlib, sys; first = pathlib.Path({str(first)!r})\n"
        "if not first.exists():\n"
        "    first.touch(); sys.exit('OSError: [Errno 98] Address already in use')\n" + PARENT
    )
    argv = [sys.executable, "-c", text, PORT, str(tmp_path), KEY]
    with Keeper() as keeper:
        server = ServerProcess(
            keeper,
            ServerCommand(name="the server", argv=argv),
            log=tmp_path / "log",
            where="sampling",
            start_timeout=30,
        )
        assert keeper.servers == 2
        assert not server.has_ended


def test_a_chosen_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as taken, Keeper() as keeper:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=f"cannot listen on port {port}, which another program uses"):
            ServerProcess(keeper, command(tmp_path), log=tmp_path / "log", where="--port", start_timeout=30, port=port)


def test_the_end_of_a_server_is_noticed_later_too_and_its_child_ends_with_the_keeper(tmp_path: Path) -> None:
    with Keeper() as keeper:
        server = started(keeper, tmp_path)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        wait_until(lambda: server.has_ended)
        assert "exit code -9" in server.failure().message
        assert is_living(pids(tmp_path)[1])
    wait_until(lambda: gone(tmp_path), seconds=10)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no folder shows the machine's shared memory")
def test_a_server_that_does_not_end_when_it_is_asked_to_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", IMPATIENT, argv[-1]], **options)

    starting = SimpleNamespace(Popen=impatient, PIPE=subprocess.PIPE)
    monkeypatch.setattr("alignment.engines.server_process.subprocess", starting)
    started_as = tmp_path / "pid"
    argv = [sys.executable, "-c", STUBBORN, str(started_as)]
    with Keeper() as keeper:
        keeper.start({"argv": argv, "environment": {}, "log": str(tmp_path / "log")})
        wait_until(lambda: started_as.exists() and started_as.read_text().endswith("\n"))
        pid, memory = started_as.read_text().split()
        assert SHARED_MEMORY.joinpath(memory).exists()
    assert not is_living(int(pid))
    assert not SHARED_MEMORY.joinpath(memory).exists()
    assert not keeper.folder.exists()
