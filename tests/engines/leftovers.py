"""Watches a command and everything that it starts, and finds what of that is left when it has ended."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from alignment.engines.server_process import is_free
from tests.living import is_living

MARK = "LEFTOVERS_MARK"
"""A variable that all descendants of the command inherit."""
LOOK_SECONDS = 0.3
SHARED_MEMORY = "/dev/shm/"


@dataclass
class Watched:
    """A command under way: all processes that were ever seen below it, their ports, and their temporary files. A
    process that leaves the command's tree is recognised by a variable, and its descendants by their parents: vLLM
    writes over the variables of its own."""

    command: subprocess.Popen[str]
    mark: str
    processes: dict[tuple[int, float], psutil.Process] = field(default_factory=dict)
    ports: set[int] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Remembers what there is now."""
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    self._remember(process)
        for process in list(self.processes.values()):
            with suppress(psutil.Error, OSError):
                for child in process.children(recursive=True):
                    self._remember(child)
        for process in list(self.processes.values()):
            with suppress(psutil.Error, OSError):
                self.ports |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            with suppress(psutil.Error, OSError):
                self.files |= {m.path for m in process.memory_maps() if m.path.startswith(SHARED_MEMORY)}
                self.files |= {opened.path for opened in process.open_files() if opened.path.startswith(SHARED_MEMORY)}

    def _remember(self, process: psutil.Process) -> None:
        self.processes.setdefault((process.pid, process.create_time()), process)
        folder = process.environ().get("TMPDIR", "")
        if "alignment-server-" in folder:
            self.files.add(folder)

    def servers(self) -> list[psutil.Process]:
        """Those of vLLM that run now."""
        return [process for process in self._living() if "vllm" in " ".join(_words(process)).lower()]

    def _living(self) -> list[psutil.Process]:
        return [process for process in list(self.processes.values()) if is_living(process)]

    def left(self) -> list[str]:
        """Processes, ports and files that are still there."""
        return [
            *(f"process {process.pid} {' '.join(_words(process))[:120]}" for process in self._living()),
            *(f"port {port}" for port in sorted(self.ports) if not is_free(port)),
            *(f"file {path}" for path in sorted(self.files) if os.path.exists(path.removesuffix(" (deleted)"))),
        ]

    def left_after(self, seconds: float) -> list[str]:
        """What is left when nothing is, or after so long."""
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@contextmanager
def watched(argv: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[Watched]:
    """Starts a command and watches it until the block ends; then nothing of it runs any more."""
    mark, over = secrets.token_hex(8), threading.Event()
    with log.open("w") as sink:
        command = subprocess.Popen(argv, stdout=sink, stderr=sink, text=True, env={**environment, MARK: mark})
    watch = Watched(command=command, mark=mark)

    def looking() -> None:
        while not over.wait(LOOK_SECONDS):
            watch.look()

    thread = threading.Thread(target=looking, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
        command.kill()
        command.wait()
        for process in watch._living():
            with suppress(psutil.Error):
                process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return [process.name(), *process.cmdline()]
    except psutil.Error:
        return []
