"""Answers of at most 64 tokens to 32 prompts at temperature 1: ours, or ``model.generate``, in bf16 or float32.

The two draw different random numbers, so answers differ; real tokens of each are counted, the one that ends an answer
included, and mean lengths stand beside the speed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import device, matmul_peak, synchronise, write_result
from benchmarks.setting import SAMPLED_TOKENS, SAMPLING_SEEDS, read_json

Answers = list[list[int]]
WARM_UP_TOKENS = 4


def main(task_file: Path) -> None:
    """Samples once a seed and writes the result."""
    task = read_json(task_file)
    ours, exact = task["contestant"].startswith("ours"), task["contestant"].endswith("float32")
    dtype = torch.float32 if exact else torch.bfloat16
    peak = matmul_peak(dtype)
    end = AutoTokenizer.from_pretrained(task["base"]).eos_token_id
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=dtype).to(device()).eval()
    prompts: list[list[int]] = read_json(Path(task["tokens"]))
    answer = (_ours if ours else _theirs)(model, prompts, end)
    answer(0, WARM_UP_TOKENS)
    seconds, lengths = [], []
    for seed in SAMPLING_SEEDS:
        synchronise()
        started = time.perf_counter()
        answers = answer(seed, SAMPLED_TOKENS)
        synchronise()
        seconds.append(time.perf_counter() - started)
        lengths.append([real_length(row, end) for row in answers])
    write_result(Path(task["result"]), peak=peak, seconds=seconds, losses=[], lengths=lengths)


def real_length(answer: list[int], end: int) -> int:
    """Tokens up to and including the first ``end``; all of them where there is none."""
    return answer.index(end) + 1 if end in answer else len(answer)


def _ours(model: Any, prompts: list[list[int]], end: int) -> Callable[[int, int], Answers]:
    from alignment.models.forward.flat import use_flat_attention
    from alignment.models.forward.generate import Sampling, generate

    use_flat_attention(model)

    def answer(seed: int, limit: int) -> Answers:
        rng = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts), limit, generator=rng, dtype=torch.float64)
        sampling = Sampling(temperature=1.0, uniforms=uniforms)
        return generate(model, prompts, max_new_tokens=limit, end_ids=[end], batch_size=len(prompts), sampling=sampling)

    return answer


def _theirs(model: Any, prompts: list[list[int]], end: int) -> Callable[[int, int], Answers]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=device())
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device())

    def answer(seed: int, limit: int) -> Answers:
        torch.manual_seed(seed)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=real,
                max_new_tokens=limit,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=end,
                pad_token_id=end,
            )
        rows: Answers = found[:, longest:].tolist()
        return rows

    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
