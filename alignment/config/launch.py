"""On what a stage runs. Nothing here changes a result, so nothing here is part of a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Annotated, ClassVar

from alignment.config.backend import Backend, LocalBackend, MachinesBackend, SlurmBackend
from alignment.config.rules import NOT_NEGATIVE, POSITIVE

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


def _of_backend(kind: str, cls: type) -> dict[str, str]:
    return {
        field.name: f"where stages run is a choice of its own now; write launch/backend={kind} "
        f"launch.backend.{field.name}={{value}}"
        for field in fields(cls)
        if field.name != "kind"
    }


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """``num_processes`` workers on each machine; 0 is one for each GPU of a machine.

    ``threads`` are those of a process; 0 shares the cores evenly. ``grace_seconds`` is how long a stage that was asked
    to stop may take to save before it is killed. A stage in which no process does anything for ``hang_seconds`` is
    ended (0: never). ``backend`` is where the processes run.
    """

    REPLACED: ClassVar[dict[str, str]] = {
        **_of_backend("machines", MachinesBackend),
        **{f"slurm.{key}": hint for key, hint in _of_backend("slurm", SlurmBackend).items()},
    }

    kind: LauncherKind = LauncherKind.auto
    sharding: Sharding = Sharding.none
    offload: Offload = Offload.none
    num_processes: Annotated[int, NOT_NEGATIVE] = 1
    threads: Annotated[int, NOT_NEGATIVE] = 0
    grace_seconds: Annotated[int, POSITIVE] = 120
    hang_seconds: Annotated[int, NOT_NEGATIVE] = 600
    backend: Backend = field(default_factory=LocalBackend)

    @property
    def world_size(self) -> int:
        """Processes on all machines together."""
        return self.num_processes * self.backend.num_machines
