"""On what a stage runs. Nothing here changes a result, so nothing here is part of a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import FILLED, NOT_NEGATIVE, PORT, POSITIVE, SLURM_MEMORY, SLURM_TIME, SLURM_WORD

DEVICE = "ALIGNMENT_DEVICE"
"""The variable by which the launcher tells a worker its device, ``cpu`` or ``cuda``; unset for a process that was
started without it."""


class LauncherKind(str, Enum):
    """How worker processes are started.

    ``auto`` takes ``accelerate launch`` for one process or for GPUs, and ``torchrun`` for several CPU processes, which
    ``accelerate launch`` cannot start on one machine (it starts a single one without saying so), and for several
    machines.
    """

    auto = "auto"
    accelerate = "accelerate"
    torchrun = "torchrun"


class Sharding(str, Enum):
    """What processes share out among themselves instead of all holding it.

    ``none``: nothing; each holds a whole model and gradients are averaged (DistributedDataParallel). ``zero1``: the
    optimiser's state; ``zero2``: gradients too; ``zero3``: weights too (Rajbhandari et al. 2020, by DeepSpeed).
    ``fsdp``: all three, by PyTorch (Zhao et al. 2023, ``fully_shard``).
    """

    none = "none"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp = "fsdp"

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed does it."""
        return self in (Sharding.zero1, Sharding.zero2, Sharding.zero3)


class Offload(str, Enum):
    """What a GPU's share gives to the machine's own memory: nothing, the optimiser's state, or weights as well."""

    none = "none"
    optimizer = "optimizer"
    weights = "weights"


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """One Slurm job for each stage that has to run, if ``submit``; what is None is left to the cluster's defaults.

    A job may take ``time`` (``"4:00:00"``, ``"2-12:00:00"``) and is asked to save ``signal_seconds`` before that is
    over; it is then queued again and goes on. Its one machine gives it ``gpus``, ``cpus`` and ``memory`` (``64G``).
    ``wait``: the command stays until the last job has ended and returns the run's exit code.
    """

    submit: bool = False
    partition: Annotated[str | None, SLURM_WORD] = None
    account: Annotated[str | None, SLURM_WORD] = None
    qos: Annotated[str | None, SLURM_WORD] = None
    time: Annotated[str | None, SLURM_TIME] = None
    gpus: Annotated[int, NOT_NEGATIVE] = 0
    cpus: Annotated[int | None, POSITIVE] = None
    memory: Annotated[str | None, SLURM_MEMORY] = None
    signal_seconds: Annotated[int, POSITIVE] = 300
    wait: bool = True


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """``num_processes`` workers on each of ``num_machines``; 0 is one for each GPU of a machine.

    ``threads`` are those of a process; 0 shares the cores evenly. ``grace_seconds`` is how long a stage that was asked
    to stop may take to save before it is killed. A stage in which no process does anything for ``hang_seconds`` is
    ended (0: never). With several machines, the same command is started on each with its own ``machine_rank`` on one
    shared folder; they meet at ``main_address:main_port``, which is on the machine of rank 0.
    """

    kind: LauncherKind = LauncherKind.auto
    sharding: Sharding = Sharding.none
    offload: Offload = Offload.none
    num_processes: Annotated[int, NOT_NEGATIVE] = 1
    num_machines: Annotated[int, POSITIVE] = 1
    machine_rank: Annotated[int, NOT_NEGATIVE] = 0
    main_address: Annotated[str, FILLED] = "127.0.0.1"
    main_port: Annotated[int, PORT] = 29400
    threads: Annotated[int, NOT_NEGATIVE] = 0
    grace_seconds: Annotated[int, POSITIVE] = 120
    hang_seconds: Annotated[int, NOT_NEGATIVE] = 600
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def world_size(self) -> int:
        """Processes on all machines together."""
        return self.num_processes * self.num_machines
