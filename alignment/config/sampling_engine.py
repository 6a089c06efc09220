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
    """How answers are sampled.

    The other settings are for ``engine: vllm``. The stage starts a server with the interpreter ``python`` of an
    environment that has vLLM (default: the variable ALIGNMENT_ENGINE_PYTHON, else where ``make engine`` puts it), and
    stops it at the end. With ``url`` it uses a server that already runs on this machine and was started as
    docs/engines.md says. ``api_key_env`` names the variable with that server's key.

    A server that the stage starts has ``cache_gb`` GiB for keys and values on a CPU, or ``gpu_share`` of a GPU's memory
    for everything. It must answer within ``start_timeout`` seconds after it was started. A call waits ``timeout``
    seconds and is retried ``retries`` times; ``concurrency`` calls run at once.
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
    """How answers are sampled while a policy learns, and what is done about differences between engine and policy.

    The policy's log-probabilities always come from the forward pass that is used for training. If ``importance_cap`` is
    set, the ratio of these probabilities to the engine's multiplies the loss of each token, up to that cap (truncated
    importance sampling, Yao et al. 2025). With ``max_staleness`` 1 the answers for an update are sampled while the
    previous update is still being learned from, so they come from the policy before that update. Log-probabilities that
    differ by more than ``gap_bound`` nats are counted.
    """

    importance_cap: Annotated[float | None, AT_LEAST_ONE] = field(default=None, metadata=IF_SET)
    max_staleness: Annotated[int, ZERO_OR_ONE] = field(default=0, metadata=IF_SET)
    gap_bound: Annotated[float, POSITIVE] = field(default=0.1, metadata=_NOT_IDENTITY)
