"""On what a stage runs. Nothing here changes a result, so nothing here is part of a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class LauncherKind(str, Enum):
    """How worker processes are started.

    ``auto`` takes ``accelerate launch`` for one process or for GPUs, and ``torchrun`` for several CPU processes, which
    ``accelerate launch`` cannot start on one machine (it starts a single one without saying so).
    """

    auto = "auto"
    accelerate = "accelerate"
    torchrun = "torchrun"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """``num_processes`` workers on this machine; ``threads`` per process, 0 shares the cores evenly.

    ``grace_seconds`` is how long a stage that was asked to stop may take to save before it is killed. A stage in which
    no process does anything for ``hang_seconds`` is ended (0: never).
    """

    kind: LauncherKind = LauncherKind.auto
    num_processes: int = 1
    threads: int = 0
    grace_seconds: int = 120
    hang_seconds: int = 600
