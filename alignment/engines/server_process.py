"""Starts and ends a server beside a stage, and the command and settings of vLLM's."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from alignment.config.launch import SamplingConfig
from alignment.core import hardware
from alignment.core.child_processes import children_of
from alignment.core.errors import AlignmentError, StageError
from alignment.core.locks import is_held
from alignment.engines.keeper_process import GRACE_SECONDS, NOT_STARTED, command_file, exit_file, lock_file, pid_file

HOST = "127.0.0.1"
PORT, KEY = "{port}", "{key}"
"""Stand for the port and the key in a command."""
_PREFIX = "alignment-server-"
_LEFTOVER_SECONDS = 3600.0
"""A folder this old has long been locked by its keeper, if that lives."""
_TRIES = 3
_POLL_SECONDS = 0.2
_TAIL = 100_000
"""Bytes of a log in which the cause of an end is looked for."""
_PORT_TAKEN = ("address already in use", "errno 98")
_NO_MEMORY = ("out of memory", "outofmemoryerror", "cannot allocate memory", "bad_alloc")
_TOO_SMALL_A_SHARE = "no available memory for the cache"
"""vLLM's words where the weights take all that it may use."""
_ERROR = re.compile(r"\b(?!EngineDeadError)[A-Z]\w*Error: .*")
"""What ended a server; vLLM's EngineDeadError says only that something else did."""
_KILLED = -9
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy of the environment does not reach this machine's own addresses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCommand:
    """How a server is started; ``{port}`` and ``{key}`` in ``argv`` and ``environment`` are filled in. ``name`` is for
    messages. ``smaller`` says how to make the server need less memory, ``larger`` how to give it more."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    smaller: str = ""
    larger: str = ""


class Keeper:
    """A folder for temporary files, and the process that removes it and ends its servers when this one ends.

    Example::

        with Keeper() as keeper:
            server = ServerProcess(keeper, command, log=Path("server.log"), where="sampling", start_timeout=600)"""

    def __init__(self) -> None:
        _remove_leftovers(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.servers = 0
        process = subprocess.Popen(
            [sys.executable, "-m", "alignment.engines.keeper_process", str(self.folder)], stdin=subprocess.PIPE
        )
        assert process.stdin is not None, "its standard input is a pipe"
        self._pipe = process.stdin
        if process.wait() != 0:  # it goes on in a process that is no child of this one
            raise StageError("the process that supervises servers cannot be started", where=str(self.folder))
        self._pid = int(pid_file(self.folder).read_text())

    @property
    def is_alive(self) -> bool:
        """Whether it still keeps its folder; somebody may have killed it."""
        try:
            return self.folder.exists() and psutil.Process(self._pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def start(self, command: Mapping[str, object]) -> int:
        """Starts a server in place of the last one; returns its number. Raises StageError: somebody ended the
        keeper."""
        if not self.is_alive:
            raise StageError("the process that supervises servers was killed", remedy="run again; the stage continues")
        self.servers += 1
        written = self.folder / "command.partial"
        written.touch(mode=0o600)  # it has the server's key
        written.write_text(json.dumps(command), encoding="utf-8")
        written.rename(command_file(self.folder, self.servers))
        return self.servers

    def exit_code(self, number: int) -> int | None:
        """That of a server that has ended by itself, or was killed; None while it runs."""
        if not self.is_alive:
            return _KILLED
        with suppress(FileNotFoundError, ValueError):
            return int(exit_file(self.folder, number).read_text().split(maxsplit=1)[0])
        return None

    def why_not_started(self, number: int) -> str:
        """Why a program could not be started; empty if it was."""
        with suppress(FileNotFoundError):
            code, _, reason = exit_file(self.folder, number).read_text().partition(" ")
            return reason if code == str(NOT_STARTED) else ""
        return ""

    def peak_memory(self) -> float | None:
        """Bytes: the peaks of the running server's processes, added up, so pages that they share count several times.
        None if no server runs, or where the system does not say."""
        with suppress(psutil.Error):
            processes = children_of(psutil.Process(self._pid), recursive=True)
            return sum(peak for process in processes if (peak := hardware.resident_peak(process.pid))) or None
        return None

    def run(self, command: ServerCommand, *, log: Path) -> int:
        """Runs a program that is no server to its end, with its output in ``log``; returns its exit code."""
        environment = dict(command.environment)
        number = self.start({"argv": list(command.argv), "environment": environment, "log": str(log)})
        while (code := self.exit_code(number)) is None:
            time.sleep(_POLL_SECONDS)
        return code

    def close(self) -> None:
        """Ends the server and removes the folder; returns when both are gone."""
        self._pipe.close()
        deadline = time.monotonic() + 4 * GRACE_SECONDS
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ServerProcess:
    """A server that answers; its ``keeper`` ends it. ``where`` is the setting that asks for it. ``log`` is the file for
    its output. ``waiting`` is called while the server starts. ``port`` is fixed, or a free one is chosen. ``look`` says
    how to learn more about a failure; by default, to read the log."""

    def __init__(
        self,
        keeper: Keeper,
        command: ServerCommand,
        *,
        log: Path,
        where: str,
        start_timeout: float,
        waiting: Callable[[], None] = lambda: None,
        port: int | None = None,
        look: str = "",
    ) -> None:
        """Starts the server, in place of the keeper's last one. Raises StageError: it ended, or did not answer in time;
        says why, as far as its log tells."""
        self._keeper = keeper
        self._command = command
        self._log = log
        self._where = where
        self._look = look or f"read {log}"
        self.key = secrets.token_hex(16)
        if port is not None and not is_free(port):
            raise StageError(
                f"{command.name} cannot listen on port {port}, which another program uses",
                where=where,
                remedy="choose another port",
            )
        for attempt in range(_TRIES):
            self.port = port or free_port()
            self._start()
            try:
                self._wait(start_timeout, waiting)
                return
            except StageError:
                was_taken = any(words in self._tail().lower() for words in _PORT_TAKEN)
                if port is not None or attempt == _TRIES - 1 or not was_taken:
                    raise

    @property
    def url(self) -> str:
        """Its address, as ``http://127.0.0.1:8000``."""
        return f"http://{HOST}:{self.port}"

    @property
    def has_ended(self) -> bool:
        return self._exit_code() is not None

    def failure(self) -> StageError:
        code, tail = self._exit_code(), self._tail()
        reason, remedy = f"{self._command.name} ended with exit code {code}", self._look
        if why := self._keeper.why_not_started(self._number):
            reason = f"{self._command.name} cannot be started: {why}"
        elif _TOO_SMALL_A_SHARE in tail.lower():
            reason = f"{reason}: its model leaves no memory for keys and values"
            remedy = f"{self._command.larger}; {remedy}" if self._command.larger else remedy
        elif code == _KILLED or any(word in tail.lower() for word in _NO_MEMORY):
            reason = f"{reason}: it was killed, or there was not enough memory"
            remedy = f"{self._command.smaller}; {remedy}" if self._command.smaller else remedy
        elif errors := _ERROR.findall(tail):
            reason = f"{reason}: {errors[-1].strip()[:300]}"
        return StageError(reason, where=self._where, remedy=remedy)

    def _start(self) -> None:
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        values = {PORT: str(self.port), KEY: self.key}
        environment = {name: _filled(value, values) for name, value in self._command.environment.items()}
        command = {
            "argv": [_filled(word, values) for word in self._command.argv],
            "environment": {"TMPDIR": str(self._keeper.folder), **environment},
            "log": str(self._log),
        }
        self._number = self._keeper.start(command)

    def _wait(self, seconds: float, waiting: Callable[[], None]) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if self.has_ended:
                raise self.failure()
            if self._answers():
                return
            if time.monotonic() > deadline:
                raise StageError(
                    f"{self._command.name} did not answer within {seconds:g} s of starting",
                    where=self._where,
                    remedy=f"give it more time (start_timeout), or {self._look}",
                )
            waiting()
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        with suppress(OSError, urllib.error.URLError), _DIRECT.open(f"{self.url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
        return False

    def _exit_code(self) -> int | None:
        return self._keeper.exit_code(self._number)

    def _tail(self) -> str:
        if not self._log.exists():
            return ""
        with self._log.open("rb") as stream:
            stream.seek(max(self._log_start, self._log.stat().st_size - _TAIL))
            return stream.read().decode(errors="replace")


def is_free(port: int) -> bool:
    """Whether no program listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


def free_port() -> int:
    """A port of this machine that no program uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _remove_leftovers(temporary: Path) -> None:
    """Removes folders of keepers that were killed together with their owners. They may hold copies of all weights."""
    for folder in temporary.glob(f"{_PREFIX}*"):
        with suppress(OSError, AlignmentError):  # somebody else may remove it now, or the file system has no locks
            status, lock = folder.stat(), lock_file(folder)
            is_old = time.time() - status.st_mtime > _LEFTOVER_SECONDS
            if is_old and status.st_uid == os.getuid() and lock.exists() and not is_held(lock):
                shutil.rmtree(folder, ignore_errors=True)


BASE = "base"
"""The name of the weights without an adapter."""
ADAPTERS = 2
"""Adapters that the server holds: that of the policy as it is, and that of the version before."""
ON_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")
"""Arguments of a server without a GPU. vLLM 0.32 ends with "CPU Generator does not use offset" if it reads a part of a
prompt whose answer has a random seed, so it reads prompts whole."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can be prepared for."""
NO_BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""The environment of a server without a GPU: the stage shares its cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmOptions:
    """What a server must be able to do. ``model`` is the folder of the weights, in ``dtype``; ``max_length`` the
    longest prompt with its answer. ``rank`` is the highest rank of an adapter, or 0 without adapters. ``replaceable``:
    all weights will be replaced. ``on_gpu`` says where it runs."""

    model: Path
    dtype: str
    max_length: int
    rank: int = 0
    replaceable: bool = False
    on_gpu: bool = False


def vllm_command(python: Path, config: SamplingConfig, options: VllmOptions) -> ServerCommand:
    """A server that applies no defaults of a model's generation config, and gives the log-probabilities that it
    samples from."""
    environment = quiet_environment() | {"VLLM_API_KEY": KEY, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if options.replaceable:  # its endpoints need no key, so they are open only where they are used
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    device = ["--gpu-memory-utilization", str(config.gpu_share)]
    if not options.on_gpu:
        environment |= NO_BINDING
        device = [*ON_CPU, "--kv-cache-memory-bytes", str(int(config.cache_gb * 2**30))]
    return ServerCommand(
        name="vLLM",
        argv=[
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(options.model), "--served-model-name", BASE, "--skip-tokenizer-init"),
            *("--dtype", options.dtype, "--max-model-len", str(options.max_length)),
            *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
            *("--host", HOST, "--port", PORT, "--disable-uvicorn-access-log"),
            *adapter_arguments(options.rank, ADAPTERS),
            *device,
        ],
        environment=environment,
        smaller="lower sampling.gpu_share" if options.on_gpu else "lower sampling.cache_gb",
        larger="raise sampling.gpu_share, or use a smaller model" if options.on_gpu else "raise sampling.cache_gb",
    )


def quiet_environment() -> dict[str, str]:
    """Variables that keep a vLLM server offline and free of telemetry."""
    flags = dict.fromkeys(("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"), "1")
    return flags | {"TOKENIZERS_PARALLELISM": "false"}


def adapter_arguments(rank: int, adapters: int) -> Sequence[str]:
    """The arguments for so many adapters of at most this rank; none if the rank is 0."""
    if not rank:
        return ()
    fitting = next(possible for possible in RANKS if possible >= rank)
    return ("--enable-lora", "--max-lora-rank", str(fitting), "--max-loras", str(adapters))
