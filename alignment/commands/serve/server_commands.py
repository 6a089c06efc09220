"""The commands that start a server for policies."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from alignment.commands.serve.vllm_layout import VllmFiles, VllmLayout
from alignment.core import hardware
from alignment.engines.server_process import HOST, PORT, ServerCommand
from alignment.engines.vllm_server import NO_BINDING, ON_CPU, adapter_arguments, quiet_environment
from alignment.pipeline.backends import environment

CACHE, CACHE_GB = "VLLM_CPU_KVCACHE_SPACE", "1"
"""The variable for GiB of keys and values without a GPU, and its value unless the user sets another."""
TOOL_PARSER = "hermes"
"""Reads ``<tool_call>{…}</tool_call>``, which most ChatML families write; other answers stay text."""


def worker_command(name: str, settings: Path) -> ServerCommand:
    """The process on the worker's side, which serves with transformers or writes files for vLLM."""
    return ServerCommand(
        name=name,
        argv=[sys.executable, "-m", "alignment.commands.serve.worker", str(settings), PORT],
        environment=environment.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", "")),
        smaller="serve fewer arms",
    )


def vllm_command(
    python: Path, files: VllmFiles, layout: VllmLayout, *, dtype: str, api_key: str, tool_parser: str | None
) -> ServerCommand:
    """A vLLM server of the layout's policies. An empty ``api_key`` asks for none."""
    on_gpu = hardware.count_devices() > 0
    variables = quiet_environment() | {"VLLM_API_KEY": api_key}
    if not on_gpu:
        variables |= {CACHE: os.environ.get(CACHE, CACHE_GB)} | NO_BINDING
    adapters = [json.dumps({"name": arm.name, "path": str(files.adapter(arm))}) for arm in layout.arms]
    rank = max((arm.rank for arm in layout.arms), default=0)
    return ServerCommand(
        name="vLLM",
        argv=[
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(layout.weights or files.merged), "--served-model-name", layout.weights_name),
            *("--tokenizer", str(files.tokenizer), "--generation-config", str(files.generation)),
            *("--dtype", dtype, "--max-model-len", "-1"),  # the longest that fits
            *("--enable-auto-tool-choice", "--tool-call-parser", tool_parser or TOOL_PARSER),
            *("--host", HOST, "--port", PORT, "--disable-uvicorn-access-log"),
            *adapter_arguments(rank, len(adapters)),
            *(("--lora-modules", *adapters) if adapters else ()),
            *(() if on_gpu else ON_CPU),
        ],
        environment=variables,
        smaller="use a smaller model" if on_gpu else f"lower {CACHE} (GiB)",
        larger="use a smaller model" if on_gpu else f"raise {CACHE} (GiB)",
    )
