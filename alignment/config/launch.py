"""Where and how a stage runs. Nothing here changes a result, so nothing here is part of a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.backend import Backend, LocalBackend
from alignment.config.rules import NOT_NEGATIVE, POSITIVE

DEVICE = "ALIGNMENT_DEVICE"
"""The environment variable that gives a worker its device, ``cpu`` or ``cuda``; unset in a process that no launcher
started."""

DIVIDE_ROWS = "ALIGNMENT_DIVIDE_ROWS"
"""The environment variable that gives a worker ``launch.divide_rows``, as 0 or 1; unset means 1."""


class LauncherKind(str, Enum):
    """How worker processes are started.

    ``auto`` starts a single process itself (``direct``) and uses ``accelerate launch`` for several GPUs. It uses
    ``torchrun`` for several machines, for sharding, and for several CPU processes, of which ``accelerate launch``
    silently starts only one on a machine.
    """

    auto = "auto"
    direct = "direct"
    accelerate = "accelerate"
    torchrun = "torchrun"


class Sharding(str, Enum):
    """What is sharded over the processes, instead of every process holding all of it.

    ``none``: nothing; each process holds a whole model, and gradients are averaged (DistributedDataParallel).
    ``zero1``: the optimiser's state; ``zero2``: gradients too; ``zero3``: weights too (Rajbhandari et al. 2020, by
    DeepSpeed). ``fsdp``: all three, by PyTorch (Zhao et al. 2023, ``fully_shard``).
    """

    none = "none"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp = "fsdp"

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed does the sharding."""
        return self in (Sharding.zero1, Sharding.zero2, Sharding.zero3)

    @property
    def of_weights(self) -> bool:
        """Whether a process holds only a share of the weights."""
        return self in (Sharding.zero3, Sharding.fsdp)


class Offload(str, Enum):
    """What is moved from GPU memory to the machine's own: nothing, the optimiser's state, or weights as well."""

    none = "none"
    optimizer = "optimizer"
    weights = "weights"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """``num_processes`` workers run on each machine; 0 means one for each of its GPUs.

    ``threads`` is the number of threads of a process; 0 divides the cores evenly. With ``divide_rows``, two threads of
    a CPU compute rows of their own. Without it they share every operation, which is better beside another process that
    needs a core. ``grace_seconds`` is the time that a stage has to save after it was asked to stop; then it is killed.
    A stage in which no process does anything for ``hang_seconds`` is ended (0: never). ``backend`` is where the
    processes run.
    """

    kind: LauncherKind = LauncherKind.auto
    sharding: Sharding = Sharding.none
    offload: Offload = Offload.none
    num_processes: Annotated[int, NOT_NEGATIVE] = 1
    threads: Annotated[int, NOT_NEGATIVE] = 0
    divide_rows: bool = True
    grace_seconds: Annotated[int, POSITIVE] = 120
    hang_seconds: Annotated[int, NOT_NEGATIVE] = 600
    backend: Backend = field(default_factory=LocalBackend)

    @property
    def world_size(self) -> int:
        """The number of processes on all machines together."""
        return self.num_processes * self.backend.num_machines
