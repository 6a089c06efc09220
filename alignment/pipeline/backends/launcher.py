"""From a launch configuration and a stage file to a command, and one call that runs it.

Everything a worker needs beside its stage file is in the command's environment: offline, no telemetry, threads shared
out, our own package found first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from alignment.config.launch import DEVICE, LaunchConfig, LauncherKind, Sharding
from alignment.core import hardware
from alignment.core.errors import AlignmentError, ConfigError
from alignment.core.logs import shorten
from alignment.core.resources import CODE_ROOT, shipped
from alignment.core.stop_requests import SIGNALS

_POLL_SECONDS = 0.5

CPU_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}
"""Memory that a tensor gave back is used again. glibc would return it to the system and fetch fresh pages for the next
tensor, which took as long as the arithmetic on it. oneDNN keeps code for 1,024 shapes of products, and nearly every
batch has new ones: gigabytes after some dozen steps (docs/LOG.md, 2026-11-25). What the user has set stays."""

WAITING_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Whoever sets one of these has chosen how OpenMP's threads wait."""
_SPINS_ON_AMD = "1000"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """``argv`` to execute, and ``environment``: variables laid over the caller's."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def command(
    launch: LaunchConfig, stage_file: Path, *, devices: Sequence[str], num_cores: int, pythonpath: str = ""
) -> Command:
    """The command that runs a stage on this machine. ``devices`` are its GPUs (``visible_devices``), none for the CPU.

    Raises:
        ConfigError: this launcher cannot start so many processes here.
    """
    kind = chosen_launcher(launch, num_devices=len(devices))
    argv = (sys.executable, *_LAUNCHERS[kind](launch, len(devices)), "alignment.worker", str(stage_file))
    threads = launch.threads or max(1, num_cores // launch.num_processes)
    own_devices = _devices_of_processes(devices, launch.num_processes)
    return Command(argv=argv, environment=environment(threads, pythonpath) | own_devices)


def _devices_of_processes(devices: Sequence[str], num_processes: int) -> dict[str, str]:
    """The device that each process has to find, and no GPU more than there are processes: a process that sees several
    without a launcher's rank would spread every batch over all of them (transformers' DataParallel)."""
    if not devices:
        return {DEVICE: "cpu"}
    variable = next((name for name in hardware.VISIBLE if name in os.environ), hardware.VISIBLE[0])
    return {DEVICE: "cuda", variable: ",".join(devices[:num_processes])}


def with_processes(launch: LaunchConfig, *, num_devices: int) -> LaunchConfig:
    """The launch with one process for each GPU where it asks for that.

    Raises:
        ConfigError: there is no GPU.
    """
    if launch.num_processes:
        return launch
    if num_devices == 0:
        raise ConfigError(
            "one process for each GPU is asked for, and this machine has none",
            where="launch.num_processes",
            remedy="launch.num_processes=2 starts two processes on the CPU",
        )
    return replace(launch, num_processes=num_devices)


def chosen_launcher(launch: LaunchConfig, *, num_devices: int) -> LauncherKind:
    """The launcher that ``auto`` stands for, or the one asked for if it can do it.

    Raises:
        ConfigError: more processes than GPUs, or what this launcher does not start.
    """
    workers = launch.num_processes
    if num_devices and workers > num_devices:
        raise ConfigError(
            f"{workers} processes, but this machine has {num_devices} GPU{'s' if num_devices > 1 else ''}",
            where="launch.num_processes",
            remedy=f"launch.num_processes={num_devices}",
        )
    if launch.kind is LauncherKind.auto:
        plain = launch.sharding is Sharding.none and launch.num_machines == 1
        return LauncherKind.accelerate if plain and (workers == 1 or num_devices) else LauncherKind.torchrun
    if why := _refusal(launch, num_devices):
        raise ConfigError(why, where="launch.kind", remedy="launch.kind=auto or launch.kind=torchrun")
    return launch.kind


def _refusal(launch: LaunchConfig, num_devices: int) -> str:
    """Why accelerate cannot start this, or nothing; torchrun starts all."""
    if launch.kind is LauncherKind.torchrun:
        return ""
    if launch.num_machines > 1:
        return "several machines are started by torchrun, not by accelerate"
    if launch.sharding is not Sharding.none:
        return f"{launch.sharding.value} needs a process group, which accelerate does not make for one process"
    if launch.num_processes > 1 and num_devices == 0:
        return "accelerate starts one process, whatever it is told, on a machine without GPUs"
    return ""


def _nothing(_: BaseException) -> None:
    """Nobody has to hear of an interruption."""


def execute(
    command: Command,
    *,
    log: Path,
    on_poll: Callable[[], None],
    grace_seconds: float,
    on_stop: Callable[[BaseException], None] = _nothing,
    keep_open: Sequence[int] = (),
) -> int:
    """Runs a command to its end, output appended to ``log``, of which beginning and end are kept where it gets long;
    returns its exit code, negative for a signal.

    The command has a session of its own, so that Ctrl-C reaches this process alone. If this call is interrupted (by
    Ctrl-C, or an exception raised in a signal handler), the workers are asked to stop, awaited for ``grace_seconds``,
    then killed; the interruption goes on. No process of the command outlives this call. ``on_poll`` is called twice a
    second; where it finds that they are lost and raises an AlignmentError, they are killed at once. ``on_stop`` is
    called with an interruption before the wait for it. Descriptors in ``keep_open`` stay open in the command, and locks
    with them.
    """
    with log.open("ab") as sink, _answered_later() as came, _deaf_launcher():
        leader = psutil.Popen(
            command.argv,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
        )
    family = _Family(leader)
    try:
        for number in came:
            signal.raise_signal(number)
        while (code := _exit_code(leader)) is None:
            family.look()
            shorten(log)
            on_poll()
        if -code in SIGNALS:  # the launcher alone was asked to stop, and its workers have yet to hear of it
            family.ask_to_stop()
            family.wait(grace_seconds)
        return code
    except AlignmentError:
        raise
    except BaseException as stop:
        family.ask_to_stop()
        with suppress(
            OSError, SystemExit
        ):  # a terminal that was closed takes no words, and the worker saves all the same
            on_stop(stop)
        family.wait(grace_seconds)
        raise
    finally:
        family.kill()
        shorten(log)


@contextmanager
def _deaf_launcher() -> Iterator[None]:
    """SIGUSR1 would kill a launcher, which knows nothing of it; workers take it as a request. A process that is started
    while a signal is blocked goes on to block it, and so do those that it starts; workers unblock it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _answered_later() -> Iterator[list[int]]:
    """Signals that come while a process starts; an exception of their handlers would leave it without anybody who knows
    of it."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's
        yield came
        return
    taken = [number for number in SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in taken}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(leader: psutil.Popen) -> int | None:
    """Waits a moment; None while it still runs."""
    try:
        return int(leader.wait(timeout=_POLL_SECONDS))
    except psutil.TimeoutExpired:
        return None


class _Family:
    """A launcher and all that it started, remembered so that workers are found even after their launcher died."""

    def __init__(self, leader: psutil.Process) -> None:
        self._leader = leader
        self._known: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Notes who is there now."""
        with suppress(psutil.NoSuchProcess):
            for process in self._leader.children(recursive=True):
                self._known.setdefault(process.pid, process)

    def ask_to_stop(self) -> None:
        """SIGTERM to the workers alone: a launcher that got it would end, or give its workers little time to save."""
        self.look()
        try:
            workers = self._leader.children()
        except psutil.NoSuchProcess:
            workers = []
        for process in workers or list(self._known.values()) or [self._leader]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()

    def wait(self, seconds: float) -> None:
        """Returns when all have ended, or after ``seconds``; a second interruption ends the wait."""
        deadline = time.monotonic() + seconds
        while self._alive() and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)

    def kill(self) -> None:
        """Ends whoever is left, and collects the launcher."""
        for process in self._alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._leader.wait()

    def _alive(self) -> list[psutil.Process]:
        return [process for process in [self._leader, *self._known.values()] if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    """A process that ended and was not collected by its parent does not count."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _accelerate(launch: LaunchConfig, num_devices: int) -> list[str]:
    """With a configuration file of ours, so that none in the user's home folder has a say, and a free port of its own
    choosing, so that two runs on one machine never meet."""
    several = num_devices > 0 and launch.num_processes > 1
    file = shipped("launch") / "accelerate" / ("ddp.yaml" if several else "local.yaml")
    told = ["--config_file", str(file), "--num_processes", str(launch.num_processes)]
    told += ["--main_process_port", "0"] if several else []
    return ["-m", "accelerate.commands.launch", *told, *([] if num_devices else ["--cpu"]), "-m"]


def _torchrun(launch: LaunchConfig, num_devices: int) -> list[str]:
    """On one machine a rendezvous on a port of its own choosing, so that two runs on one machine never meet."""
    meeting = ["--standalone", "--nnodes", "1"]
    if launch.num_machines > 1:
        meeting = ["--nnodes", str(launch.num_machines), "--node_rank", str(launch.machine_rank)]
        meeting += ["--master_addr", launch.main_address, "--master_port", str(launch.main_port)]
    return ["-m", "torch.distributed.run", *meeting, "--nproc_per_node", str(launch.num_processes), "-m"]


_LAUNCHERS = {
    LauncherKind.accelerate: _accelerate,
    LauncherKind.torchrun: _torchrun,
}


def environment(threads: int, pythonpath: str) -> dict[str, str]:
    """Variables laid over the caller's for a process of the worker's side."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **own_code(pythonpath),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: value for name, value in (CPU_MEMORY | _on_cpu()).items() if name not in os.environ},
        **({} if any(name in os.environ for name in WAITING_SETTINGS) else idle_threads()),
    }


def idle_threads(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Has OpenMP's idle threads sleep soon. By default they spin for milliseconds, and beside another busy process they
    spin on the core that a working thread needs: training steps took 18 times as long.

    On two Intel cores, sleeping at once cost nothing on a quiet machine. On two AMD cores it cost a fifth, and a short
    spin a twentieth (docs/LOG.md, 2026-11-26).
    """
    with suppress(OSError):
        if "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace"):
            return {"GOMP_SPINCOUNT": _SPINS_ON_AMD}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def own_code(pythonpath: str) -> dict[str, str]:
    """Variables by which a process finds this package first, whatever lies in the folder that it starts in."""
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(part for part in (str(CODE_ROOT), pythonpath) if part)}


def _on_cpu() -> dict[str, str]:
    """DeepSpeed, where it is installed, would warn in every log that it found no GPU. Nothing is compiled at run time,
    and reading in PyTorch's compiler because bitsandbytes names it takes a stage most of a second."""
    return {} if hardware.count_devices() else {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
