"""Where the processes of a stage run: on this machine, on several, or as jobs of Slurm.

How they share a model (``launch``) is a separate choice. Every backend works with every such choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from alignment.config.rules import FILLED, NOT_NEGATIVE, PORT, POSITIVE, SLURM_MEMORY, SLURM_TIME, SLURM_WORD


@dataclass(kw_only=True, slots=True)
class LocalBackend:
    """This machine."""

    num_machines: ClassVar[int] = 1
    machine_rank: ClassVar[int] = 0

    kind: str = "local"


@dataclass(kw_only=True, slots=True)
class MachinesBackend:
    """``num_machines`` machines with a shared folder. The same command is started on each, with its ``machine_rank``.

    Their processes meet at ``main_address:main_port``, on the machine of rank 0.
    """

    kind: str = "machines"
    num_machines: Annotated[int, POSITIVE] = 2
    machine_rank: Annotated[int, NOT_NEGATIVE] = 0
    main_address: Annotated[str, FILLED] = "127.0.0.1"
    main_port: Annotated[int, PORT] = 29400


@dataclass(kw_only=True, slots=True)
class SlurmBackend:
    """One Slurm job for each stage that has to run; settings that are null are left to the cluster's defaults.

    A job gets ``num_machines`` machines, or one for a stage that does not run on all processes, and ``gpus``, ``cpus``
    and ``memory`` (``64G``) on each. It may run for ``time`` (``"4:00:00"``, ``"2-12:00:00"``) and is asked to save
    ``signal_seconds`` before its time is over; it is then queued again and continues. With ``wait`` the command waits
    until the last job has ended and returns the run's exit code. ``submit`` is false inside a job, where the stage runs
    on the job's machines. There the job sets ``machine_rank``, ``main_address`` and ``main_port``, which mean the same
    as in ``MachinesBackend``.
    """

    kind: str = "slurm"
    submit: bool = True
    num_machines: Annotated[int, POSITIVE] = 1
    machine_rank: Annotated[int, NOT_NEGATIVE] = 0
    main_address: Annotated[str, FILLED] = "127.0.0.1"
    main_port: Annotated[int, PORT] = 29400
    partition: Annotated[str | None, SLURM_WORD] = None
    account: Annotated[str | None, SLURM_WORD] = None
    qos: Annotated[str | None, SLURM_WORD] = None
    time: Annotated[str | None, SLURM_TIME] = None
    gpus: Annotated[int, NOT_NEGATIVE] = 0
    cpus: Annotated[int | None, POSITIVE] = None
    memory: Annotated[str | None, SLURM_MEMORY] = None
    signal_seconds: Annotated[int, POSITIVE] = 300
    wait: bool = True


Backend = LocalBackend | MachinesBackend | SlurmBackend
