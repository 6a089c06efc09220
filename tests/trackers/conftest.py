"""MLflow's real server on 127.0.0.1; what needs a package that is not here is skipped, and says how to get it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from alignment.engines.engine_environment import engines_folder

SERVER = "ALIGNMENT_MLFLOW_PYTHON"
"""The environment variable that names an interpreter with all of MLflow."""
HOW = "`make trackers` brings it"
START_SECONDS = 90.0
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Nothing is sent to MLflow's makers, and no consumers of jobs are started, of which there are seven."""


@dataclass(kw_only=True)
class Server:
    python: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        argv = [str(self.python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        argv += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        argv += ["--artifacts-destination", str(self.folder / "artifacts")]
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with (self.folder / "log.txt").open("ab") as sink:
            self.process = subprocess.Popen(
                argv, stdout=sink, stderr=sink, cwd=self.folder, env=own | QUIET, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.folder / "log.txt").read_text())
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def mlflow_python() -> Path:
    named = os.environ.get(SERVER)
    python = Path(named) if named else engines_folder() / "mlflow" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment with MLflow's server here ({SERVER}); {HOW}")
    return python


@pytest.fixture(scope="session", autouse=True)
def _clients() -> None:
    for name in ("mlflow", "trackio"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed; {HOW}")


@pytest.fixture(scope="session")
def new_server(mlflow_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    servers: list[Server] = []

    def make() -> Server:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        servers.append(Server(python=mlflow_python, folder=tmp_path_factory.mktemp("mlflow"), port=port))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(new_server: Callable[[], Server]) -> Server:
    running = new_server()
    running.start()
    return running
