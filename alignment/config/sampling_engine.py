"""What samples a policy's answers: this package's own generation, or a server that runs beside the stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import AT_LEAST_ONE, NOT_NEGATIVE, PART, POSITIVE, URL, VARIABLE, ZERO_OR_ONE
from alignment.core.fingerprint import IF_SET

_NOT_IDENTITY = {"identity": False}


class Engine(str, Enum):
    """``own``: the policy samples in the process that holds it. ``vllm``: a vLLM server samples."""

    own = "own"
    vllm = "vllm"


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """What samples.

    The other settings are for ``engine: vllm``. The stage starts the server with the interpreter ``python`` of an
    environment that has vLLM (default: the variable ALIGNMENT_ENGINE_PYTHON, else where ``make engine`` puts it), and
    ends it. Or it uses a server that runs already on this machine at ``url``, whose key is in the variable
    ``api_key_env``, and which was started as docs/engines.md says.

    A server of the stage has ``cache_gb`` GiB for keys and values on a CPU, or ``gpu_share`` of a GPU's memory for
    everything. It must answer within ``start_timeout`` seconds of its start. A call waits ``timeout`` seconds and is
    retried ``retries`` times; ``concurrency`` calls run at once.
    """

    engine: Engine = Engine.own
    python: str | None = field(default=None, metadata=_NOT_IDENTITY)
    url: Annotated[str | None, URL] = field(default=None, metadata=_NOT_IDENTITY)
    api_key_env: Annotated[str | None, VARIABLE] = field(default=None, metadata=_NOT_IDENTITY)
    cache_gb: Annotated[float, POSITIVE] = field(default=1.0, metadata=_NOT_IDENTITY)
    gpu_share: Annotated[float, PART] = field(default=0.3, metadata=_NOT_IDENTITY)
    start_timeout: Annotated[float, POSITIVE] = field(default=600.0, metadata=_NOT_IDENTITY)
    timeout: Annotated[float, POSITIVE] = field(default=600.0, metadata=_NOT_IDENTITY)
    retries: Annotated[int, NOT_NEGATIVE] = field(default=2, metadata=_NOT_IDENTITY)
    concurrency: Annotated[int, POSITIVE] = field(default=64, metadata=_NOT_IDENTITY)


@dataclass(kw_only=True, slots=True)
class RolloutSamplingConfig(SamplingConfig):
    """What samples while a policy learns, and how a difference between engine and policy is treated.

    The policy's log-probabilities are always computed by the forward pass that learns. A ratio to the engine's
    multiplies the loss of each token if ``importance_cap`` is set, and is at most that (truncated importance sampling,
    Yao et al. 2025). With ``max_staleness`` 1 the answers of an update are sampled while the one before is learned
    from, by the policy before that. A log-probability that differs by more than ``gap_bound`` nats is counted.
    """

    importance_cap: Annotated[float | None, AT_LEAST_ONE] = field(default=None, metadata=IF_SET)
    max_staleness: Annotated[int, ZERO_OR_ONE] = field(default=0, metadata=IF_SET)
    gap_bound: Annotated[float, POSITIVE] = field(default=0.1, metadata=_NOT_IDENTITY)
