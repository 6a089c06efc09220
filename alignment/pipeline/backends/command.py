"""Builds the command that runs a stage on this machine: the launcher, its arguments and its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.config.launch import DEVICE, DIVIDE_ROWS, LaunchConfig, LauncherKind, LocalBackend, Sharding
from alignment.core import hardware
from alignment.core.child_processes import without_ranks
from alignment.core.errors import ConfigError
from alignment.core.files import CODE_ROOT, shipped

CPU_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "16",
}
"""Makes a process reuse the memory of freed tensors. glibc would return it to the system and fetch fresh pages for the
next tensor, which took as long as the arithmetic on it. One heap serves all threads; with a heap each, none would get
what another has freed. By default oneDNN caches code for 1,024 shapes of products, and nearly every batch has new
shapes: gigabytes after a few dozen steps (docs/LOG.md, 2026-11-25). PyTorch holds what it used for 1,024 shapes as
well, which saves no time: .3 GB (docs/LOG.md, 2026-11-28). Variables that the user has set stay."""

WAITING_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""If the user has set one of these, the way in which OpenMP's threads wait is left alone."""
_SPINS_ON_AMD = "1000"


def complete(own: Mapping[str, str]) -> dict[str, str]:
    """All variables of a process: the caller's without its ranks, replaced by its ``own``, with a launcher's ranks."""
    return without_ranks(os.environ) | dict(own)


def of_worker(threads: int, pythonpath: str) -> dict[str, str]:
    """Variables that replace the caller's; ``pythonpath`` is the caller's and is searched after our own folder."""
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
    """Makes OpenMP's idle threads sleep soon. By default they spin for milliseconds, and next to another busy process
    they spin on the core that a working thread needs: training steps took 18 times as long. On two Intel cores,
    sleeping at once cost nothing on a quiet machine. On two AMD cores it cost a fifth, and a short spin a twentieth
    (docs/LOG.md, 2026-11-26)."""
    with suppress(OSError):
        if "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace"):
            return {"GOMP_SPINCOUNT": _SPINS_ON_AMD}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def own_code(pythonpath: str) -> dict[str, str]:
    """Variables that make a process find this package first, whatever is in its working folder."""
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(part for part in (str(CODE_ROOT), pythonpath) if part)}


def _on_cpu() -> dict[str, str]:
    """Without a GPU: DeepSpeed, if it is installed, would warn in every log that it found none. Nothing is compiled at
    run time, but bitsandbytes imports PyTorch's compiler, which takes most of a second in each stage."""
    return {} if hardware.count_devices() else {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """``argv`` to execute, and ``environment``: variables that are added to the caller's or replace them. ``complete``
    says which of the caller's it does not get."""

    argv: tuple[str, ...]
    environment: dict[str, str]

    @property
    def module(self) -> str:
        """The module of this package that it runs by itself, without a launcher; else an empty string."""
        python, *options = self.argv
        is_own = python == sys.executable and options[:1] == ["-m"] and options[1].startswith("alignment.")
        return options[1] if is_own else ""


CommandFor = Callable[[LaunchConfig, Path], Command]
"""Makes the command that runs a stage file."""


def of_stage(
    launch: LaunchConfig, stage_file: Path, *, devices: Sequence[str], num_cores: int, pythonpath: str = ""
) -> Command:
    """The command that runs a stage on this machine. ``devices`` are its GPUs (``visible_devices``), none for the CPU.
    Raises ConfigError: this launcher cannot start that many processes here."""
    kind = chosen_launcher(launch, num_devices=len(devices))
    argv = (sys.executable, *_LAUNCHERS[kind](launch, len(devices)), "-m", "alignment.worker", str(stage_file))
    threads = launch.threads or max(1, num_cores // launch.num_processes)
    # No more visible GPUs than processes: without a rank of a launcher, a process with several would spread each batch
    # over all of them (transformers' DataParallel).
    own = {DEVICE: "cuda", **hardware.only_visible(devices[: launch.num_processes])} if devices else {DEVICE: "cpu"}
    own |= {DIVIDE_ROWS: str(int(launch.divide_rows))}
    return Command(argv=argv, environment=of_worker(threads, pythonpath) | own)


def here(launch: LaunchConfig, stage_file: Path) -> Command:
    """The same with the GPUs, cores and ``PYTHONPATH`` of this process. Raises ConfigError: this launcher cannot start
    that many processes here."""
    return of_stage(
        launch,
        stage_file,
        devices=hardware.visible_devices(),
        num_cores=hardware.count_cores(),
        pythonpath=os.environ.get("PYTHONPATH", ""),
    )


def with_processes(launch: LaunchConfig, *, num_devices: int) -> LaunchConfig:
    """The launch, with one process for each GPU if it asks for that. Raises ConfigError: it asks for that, and there is
    no GPU."""
    if launch.num_processes:
        return launch
    if num_devices == 0:
        message = "0 starts one process for each GPU, but this machine has no GPU"
        remedy = "to start two processes on the CPU, set launch.num_processes=2"
        raise ConfigError(message, where="launch.num_processes", remedy=remedy)
    return replace(launch, num_processes=num_devices)


def chosen_launcher(launch: LaunchConfig, *, num_devices: int) -> LauncherKind:
    """The launcher that ``auto`` selects, or the chosen one if it can start these processes. Raises ConfigError: there
    are more processes than GPUs, or the chosen launcher cannot start them."""
    workers = launch.num_processes
    if num_devices and workers > num_devices:
        message = f"{workers} processes, but this machine has {num_devices} GPU{'s' if num_devices > 1 else ''}"
        raise ConfigError(message, where="launch.num_processes", remedy=f"launch.num_processes={num_devices}")
    if launch.kind is LauncherKind.auto:
        if launch.sharding is not Sharding.none or launch.backend.num_machines > 1:
            return LauncherKind.torchrun
        if workers == 1:
            return LauncherKind.direct
        return LauncherKind.accelerate if num_devices else LauncherKind.torchrun
    if why := _refusal(launch, num_devices):
        raise ConfigError(why, where="launch.kind", remedy="launch.kind=auto or launch.kind=torchrun")
    return launch.kind


def _refusal(launch: LaunchConfig, num_devices: int) -> str:
    if launch.kind is LauncherKind.torchrun:
        return ""
    if launch.backend.num_machines > 1:
        return f"several machines need torchrun instead of {launch.kind.value}"
    if launch.kind is LauncherKind.direct and launch.world_size > 1:
        return f"{launch.num_processes} processes need a launcher"
    if launch.sharding is not Sharding.none:
        return f"{launch.sharding.value} needs a process group, which {launch.kind.value} does not make for one process"
    if launch.num_processes > 1 and num_devices == 0:
        return "on a machine without GPUs, accelerate starts only one process, whatever num_processes is"
    return ""


def _accelerate(launch: LaunchConfig, num_devices: int) -> list[str]:
    """Uses our own configuration file, so that one in the user's home folder has no effect, and lets accelerate choose
    a free port, so that two runs on one machine never collide."""
    several = num_devices > 0 and launch.num_processes > 1
    file = shipped("launch") / "accelerate" / ("ddp.yaml" if several else "local.yaml")
    settings = ["--config_file", str(file), "--num_processes", str(launch.num_processes)]
    settings += ["--main_process_port", "0"] if several else []
    settings += [] if num_devices else ["--cpu"]
    return ["-m", "accelerate.commands.launch", *settings]


def _torchrun(launch: LaunchConfig, num_devices: int) -> list[str]:
    """On one machine, lets torchrun choose a free port for its rendezvous, so that two runs never collide."""
    rendezvous = ["--standalone", "--nnodes", "1"]
    backend = launch.backend
    if not isinstance(backend, LocalBackend) and backend.num_machines > 1:
        rendezvous = ["--nnodes", str(backend.num_machines), "--node_rank", str(backend.machine_rank)]
        rendezvous += ["--master_addr", backend.main_address, "--master_port", str(backend.main_port)]
    return ["-m", "torch.distributed.run", *rendezvous, "--nproc_per_node", str(launch.num_processes)]


_LAUNCHERS = {
    LauncherKind.direct: lambda _, __: [],  # importing accelerate twice would take two seconds
    LauncherKind.accelerate: _accelerate,
    LauncherKind.torchrun: _torchrun,
}
