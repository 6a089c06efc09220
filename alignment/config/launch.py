"""Where and how stages run: backends, processes, sharding, and the engine that samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, ClassVar

from alignment.config import rules
from alignment.core.fingerprint import IF_SET


@dataclass(kw_only=True, slots=True)
class LocalBackend:
    """This machine."""

    num_machines: ClassVar[int] = 1
    machine_rank: ClassVar[int] = 0

    kind: str = "local"


@dataclass(kw_only=True, slots=True)
class MachinesBackend:
    """``num_machines`` machines with a shared folder. The same command is started on each, with its ``machine_rank``.

    Their processes meet at ``main_address:main_port``, on the machine of rank 0."""

    kind: str = "machines"
    num_machines: Annotated[int, rules.POSITIVE] = 2
    machine_rank: Annotated[int, rules.NOT_NEGATIVE] = 0
    main_address: Annotated[str, rules.FILLED] = "127.0.0.1"
    main_port: Annotated[int, rules.PORT] = 29400


@dataclass(kw_only=True, slots=True)
class SlurmBackend:
    """One Slurm job for each stage that has to run; settings that are null are left to the cluster's defaults.

    A job gets ``num_machines`` machines, or one for a stage that does not run on all processes, and ``gpus``, ``cpus``
    and ``memory`` (``64G``) on each. It may run for ``time`` (``"4:00:00"``, ``"2-12:00:00"``) and is asked to save
    ``signal_seconds`` before its time is over; it is then queued again and continues. With ``wait`` the command waits
    until the last job has ended and returns the run's exit code. ``submit`` is false inside a job, where the stage runs
    on the job's machines. There the job sets ``machine_rank``, ``main_address`` and ``main_port``, which mean the same
    as in ``MachinesBackend``."""

    kind: str = "slurm"
    submit: bool = True
    num_machines: Annotated[int, rules.POSITIVE] = 1
    machine_rank: Annotated[int, rules.NOT_NEGATIVE] = 0
    main_address: Annotated[str, rules.FILLED] = "127.0.0.1"
    main_port: Annotated[int, rules.PORT] = 29400
    partition: Annotated[str | None, rules.SLURM_WORD] = None
    account: Annotated[str | None, rules.SLURM_WORD] = None
    qos: Annotated[str | None, rules.SLURM_WORD] = None
    time: Annotated[str | None, rules.SLURM_TIME] = None
    gpus: Annotated[int, rules.NOT_NEGATIVE] = 0
    cpus: Annotated[int | None, rules.POSITIVE] = None
    memory: Annotated[str | None, rules.SLURM_MEMORY] = None
    signal_seconds: Annotated[int, rules.POSITIVE] = 300
    wait: bool = True


Backend = LocalBackend | MachinesBackend | SlurmBackend


DEVICE = "ALIGNMENT_DEVICE"
"""The environment variable that gives a worker its device, ``cpu`` or ``cuda``; unset in a process that no launcher
started."""

DIVIDE_ROWS = "ALIGNMENT_DIVIDE_ROWS"
"""The environment variable that gives a worker ``launch.divide_rows``, as 0 or 1; unset means 1."""


class LauncherKind(str, Enum):
    """How worker processes are started.

    ``auto`` starts a single process itself (``direct``) and uses ``accelerate launch`` for several GPUs. It uses
    ``torchrun`` for several machines, for sharding, and for several CPU processes, of which ``accelerate launch``
    silently starts only one on a machine."""

    auto = "auto"
    direct = "direct"
    accelerate = "accelerate"
    torchrun = "torchrun"


class Sharding(str, Enum):
    """What is sharded over the processes, instead of every process holding all of it.

    ``none``: nothing; each process holds a whole model, and gradients are averaged (DistributedDataParallel).
    ``zero1``: the optimiser's state; ``zero2``: gradients too; ``zero3``: weights too (Rajbhandari et al. 2020, by
    DeepSpeed). ``fsdp``: all three, by PyTorch (Zhao et al. 2023, ``fully_shard``)."""

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
    processes run."""

    kind: LauncherKind = LauncherKind.auto
    sharding: Sharding = Sharding.none
    offload: Offload = Offload.none
    num_processes: Annotated[int, rules.NOT_NEGATIVE] = 1
    threads: Annotated[int, rules.NOT_NEGATIVE] = 0
    divide_rows: bool = True
    grace_seconds: Annotated[int, rules.POSITIVE] = 120
    hang_seconds: Annotated[int, rules.NOT_NEGATIVE] = 600
    backend: Backend = field(default_factory=LocalBackend)

    @property
    def world_size(self) -> int:
        """The number of processes on all machines together."""
        return self.num_processes * self.backend.num_machines


_NOT_IDENTITY = {"identity": False}


class Engine(str, Enum):
    """``own``: the policy samples in the process that holds it. ``vllm``: a vLLM server samples."""

    own = "own"
    vllm = "vllm"


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How answers are sampled.

    The other settings are for ``engine: vllm``. The stage starts a server with the interpreter ``python`` of an
    environment that has vLLM (default: the variable ALIGNMENT_ENGINE_PYTHON, else where ``make engine`` puts it), and
    stops it at the end. With ``url`` it uses a server that already runs on this machine and was started as
    docs/engines.md says. ``api_key_env`` names the variable with that server's key.

    A server that the stage starts has ``cache_gb`` GiB for keys and values on a CPU, or ``gpu_share`` of a GPU's memory
    for everything. It must answer within ``start_timeout`` seconds after it was started. A call waits ``timeout``
    seconds and is retried ``retries`` times; ``concurrency`` calls run at once."""

    engine: Engine = Engine.own
    python: str | None = field(default=None, metadata=_NOT_IDENTITY)
    url: Annotated[str | None, rules.URL] = field(default=None, metadata=_NOT_IDENTITY)
    api_key_env: Annotated[str | None, rules.VARIABLE] = field(default=None, metadata=_NOT_IDENTITY)
    cache_gb: Annotated[float, rules.POSITIVE] = field(default=1.0, metadata=_NOT_IDENTITY)
    gpu_share: Annotated[float, rules.PART] = field(default=0.3, metadata=_NOT_IDENTITY)
    start_timeout: Annotated[float, rules.POSITIVE] = field(default=600.0, metadata=_NOT_IDENTITY)
    timeout: Annotated[float, rules.POSITIVE] = field(default=600.0, metadata=_NOT_IDENTITY)
    retries: Annotated[int, rules.NOT_NEGATIVE] = field(default=2, metadata=_NOT_IDENTITY)
    concurrency: Annotated[int, rules.POSITIVE] = field(default=64, metadata=_NOT_IDENTITY)


@dataclass(kw_only=True, slots=True)
class RolloutSamplingConfig(SamplingConfig):
    """How answers are sampled while a policy learns, and what is done about differences between engine and policy.

    The policy's log-probabilities always come from the forward pass that is used for training. If ``importance_cap`` is
    set, the ratio of these probabilities to the engine's multiplies the loss of each token, up to that cap (truncated
    importance sampling, Yao et al. 2025). With ``max_staleness`` 1 the answers for an update are sampled while the
    previous update is still being learned from, so they come from the policy before that update. Log-probabilities that
    differ by more than ``gap_bound`` nats are counted."""

    importance_cap: Annotated[float | None, rules.AT_LEAST_ONE] = field(default=None, metadata=IF_SET)
    max_staleness: Annotated[int, rules.ZERO_OR_ONE] = field(default=0, metadata=IF_SET)
    gap_bound: Annotated[float, rules.POSITIVE] = field(default=0.1, metadata=_NOT_IDENTITY)
