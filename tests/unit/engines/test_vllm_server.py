"""The command of a vLLM server: no defaults of a model, no tokenizer, and nothing open that need not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alignment.config.sampling_engine import Engine, SamplingConfig
from alignment.engines.vllm_server import VllmOptions, vllm_command

CONFIG = SamplingConfig(engine=Engine.vllm, cache_gb=0.5, gpu_share=0.4)
OPTIONS = VllmOptions(model=Path("/model"), dtype="bfloat16", max_length=640)
ALWAYS = [
    *("/env/python", "-m", "vllm.entrypoints.openai.api_server"),
    *("--model", "/model", "--served-model-name", "base", "--skip-tokenizer-init"),
    *("--dtype", "bfloat16", "--max-model-len", "640"),
    *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
    *("--host", "127.0.0.1", "--port", "{port}", "--disable-uvicorn-access-log"),
]
ON_CPU = ["--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(1 << 29)]
DEV = "VLLM_SERVER_DEV_MODE"


def test_a_server_on_a_cpu() -> None:
    command = vllm_command(Path("/env/python"), CONFIG, OPTIONS)
    assert list(command.argv) == [*ALWAYS, *ON_CPU]
    assert command.environment["VLLM_API_KEY"] == "{key}"
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environment  # vLLM takes whole numbers there
    assert command.environment["VLLM_NO_USAGE_STATS"] == command.environment["DO_NOT_TRACK"] == "1"
    assert (command.smaller, command.larger) == ("lower sampling.cache_gb", "raise sampling.cache_gb")


def test_a_server_on_a_gpu() -> None:
    command = vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, on_gpu=True))
    assert list(command.argv) == [*ALWAYS, "--gpu-memory-utilization", "0.4"]
    assert not any("CPU" in name for name in command.environment)
    assert command.smaller == "lower sampling.gpu_share"
    assert command.larger == "raise sampling.gpu_share, or use a smaller model"


@pytest.mark.parametrize(("rank", "prepared"), [(1, "8"), (8, "8"), (9, "16"), (16, "16"), (65, "128"), (512, "512")])
def test_a_server_is_prepared_for_the_rank_above(rank: int, prepared: str) -> None:
    argv = vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, rank=rank)).argv
    assert list(argv) == [
        *ALWAYS,
        *("--enable-lora", "--max-lora-rank", prepared, "--max-loras", "2"),
        *ON_CPU,
    ]


def test_endpoints_without_a_key_are_open_only_where_all_weights_are_replaced() -> None:
    assert DEV not in vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, rank=8)).environment
    assert vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, replaceable=True)).environment[DEV] == "1"
