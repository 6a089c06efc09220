"""Builds the command that runs a stage on this machine: the launcher, its arguments and its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.config.launch import DEVICE, DIVIDE_ROWS, LaunchConfig, LauncherKind, LocalBackend, Sharding
from alignment.core import hardware
from alignment.core.errors import ConfigError
from alignment.core.files import shipped
from alignment.pipeline.backends import environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """``argv`` to execute, and ``environment``: variables that are added to the caller's or replace them.

    ``environment.complete`` says which of the caller's it does not get.
    """

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

    Raises:
        ConfigError: this launcher cannot start that many processes here.
    """
    kind = chosen_launcher(launch, num_devices=len(devices))
    argv = (sys.executable, *_LAUNCHERS[kind](launch, len(devices)), "-m", "alignment.worker", str(stage_file))
    threads = launch.threads or max(1, num_cores // launch.num_processes)
    own = {DIVIDE_ROWS: str(int(launch.divide_rows)), **_devices_of_processes(devices, launch.num_processes)}
    return Command(argv=argv, environment=environment.of_worker(threads, pythonpath) | own)


def here(launch: LaunchConfig, stage_file: Path) -> Command:
    """The same with the GPUs, cores and ``PYTHONPATH`` of this process.

    Raises:
        ConfigError: this launcher cannot start that many processes here.
    """
    return of_stage(
        launch,
        stage_file,
        devices=hardware.visible_devices(),
        num_cores=hardware.count_cores(),
        pythonpath=os.environ.get("PYTHONPATH", ""),
    )


def _devices_of_processes(devices: Sequence[str], num_processes: int) -> dict[str, str]:
    """The device for each process, and no more visible GPUs than processes: without a launcher's rank, a process that
    sees several GPUs would spread every batch over all of them (transformers' DataParallel)."""
    if not devices:
        return {DEVICE: "cpu"}
    return {DEVICE: "cuda", **hardware.only_visible(devices[:num_processes])}


def with_processes(launch: LaunchConfig, *, num_devices: int) -> LaunchConfig:
    """The launch, with one process for each GPU if it asks for that.

    Raises:
        ConfigError: it asks for that, and there is no GPU.
    """
    if launch.num_processes:
        return launch
    if num_devices == 0:
        raise ConfigError(
            "0 starts one process for each GPU, but this machine has no GPU",
            where="launch.num_processes",
            remedy="to start two processes on the CPU, set launch.num_processes=2",
        )
    return replace(launch, num_processes=num_devices)


def chosen_launcher(launch: LaunchConfig, *, num_devices: int) -> LauncherKind:
    """The launcher that ``auto`` selects, or the chosen one if it can start these processes.

    Raises:
        ConfigError: there are more processes than GPUs, or the chosen launcher cannot start them.
    """
    workers = launch.num_processes
    if num_devices and workers > num_devices:
        raise ConfigError(
            f"{workers} processes, but this machine has {num_devices} GPU{'s' if num_devices > 1 else ''}",
            where="launch.num_processes",
            remedy=f"launch.num_processes={num_devices}",
        )
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
    """Why the chosen launcher cannot start this launch, or an empty string; torchrun can start all."""
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


def _direct(_: LaunchConfig, __: int) -> list[str]:
    """A single process needs none of a launcher's variables, and importing accelerate twice takes two seconds."""
    return []


_LAUNCHERS = {
    LauncherKind.direct: _direct,
    LauncherKind.accelerate: _accelerate,
    LauncherKind.torchrun: _torchrun,
}
