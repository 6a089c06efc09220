"""The command that starts a vLLM server for a stage: tokens in, tokens out, and weights that can be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.config.sampling_engine import SamplingConfig
from alignment.engines.server_process import HOST, KEY, PORT, ServerCommand

BASE = "base"
"""The name of the weights without an adapter."""
ADAPTERS = 2
"""Adapters that the server holds: that of the policy as it is, and that of the version before."""
ON_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")
"""Arguments of a server without a GPU. vLLM 0.32 ends with "CPU Generator does not use offset" if it reads a part of a
prompt whose answer has a random seed, so it reads prompts whole."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can be prepared for."""
NO_BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""The environment of a server without a GPU: the stage shares its cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmOptions:
    """What a server must be able to do.

    ``model`` is the folder of the weights, in ``dtype``; ``max_length`` the longest prompt with its answer. ``rank`` is
    the highest rank of an adapter, or 0 without adapters. ``replaceable``: all weights will be replaced. ``on_gpu``
    says where it runs.
    """

    model: Path
    dtype: str
    max_length: int
    rank: int = 0
    replaceable: bool = False
    on_gpu: bool = False


def vllm_command(python: Path, config: SamplingConfig, options: VllmOptions) -> ServerCommand:
    """A server that applies no defaults of a model's generation config, and gives the log-probabilities that it
    samples from."""
    environment = quiet_environment() | {"VLLM_API_KEY": KEY, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if options.replaceable:
        environment["VLLM_SERVER_DEV_MODE"] = (
            "1"  # its endpoints need no key, so they are open only where they are used
        )
    device = ["--gpu-memory-utilization", str(config.gpu_share)]
    if not options.on_gpu:
        environment |= NO_BINDING
        device = [*ON_CPU, "--kv-cache-memory-bytes", str(int(config.cache_gb * 2**30))]
    return ServerCommand(
        name="vLLM",
        argv=[
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(options.model), "--served-model-name", BASE, "--skip-tokenizer-init"),
            *("--dtype", options.dtype, "--max-model-len", str(options.max_length)),
            *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
            *("--host", HOST, "--port", PORT, "--disable-uvicorn-access-log"),
            *adapter_arguments(options.rank, ADAPTERS),
            *device,
        ],
        environment=environment,
        smaller="lower sampling.gpu_share" if options.on_gpu else "lower sampling.cache_gb",
        larger="raise sampling.gpu_share, or use a smaller model" if options.on_gpu else "raise sampling.cache_gb",
    )


def quiet_environment() -> dict[str, str]:
    """Variables that keep a vLLM server offline and free of telemetry."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def adapter_arguments(rank: int, adapters: int) -> Sequence[str]:
    """The arguments for so many adapters of at most this rank; none if the rank is 0."""
    if not rank:
        return ()
    fitting = next(possible for possible in RANKS if possible >= rank)
    return ("--enable-lora", "--max-lora-rank", str(fitting), "--max-loras", str(adapters))
