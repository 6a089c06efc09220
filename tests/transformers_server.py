"""The shipped model behind ``transformers serve`` on this machine, for tests of judges and graders."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignment.pipeline.sources import bundled_model

MODEL = "smollm2-135m"
NEEDED = ("openai", "fastapi", "uvicorn")
"""The client, and what ``transformers serve`` is built on."""
BOOTED = 90
"""Seconds within which the server must answer."""


def missing() -> str:
    """Why there is no such server here, or an empty string."""
    if absent := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        return f"transformers serve needs {', '.join(NEEDED[1:])}: pip install {' '.join(absent)}"
    if not bundled_model.is_ready(bundled_model.lookup(MODEL)):
        return "the shipped model is not on this machine; `make model` fetches it"
    return ""


@contextmanager
def model_served(folder: Path, *, dtype: str = "auto") -> Iterator[tuple[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = str(bundled_model.folder(bundled_model.lookup(MODEL)))
    argv = [sys.executable, "-m", "transformers.cli.transformers", "serve", name, "--device", "cpu", "--dtype", dtype]
    log = folder / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [*argv, "--host", "127.0.0.1", "--port", str(port)],
            stdout=sink,
            stderr=sink,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1", name
    finally:
        server.kill()
        server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + BOOTED
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
