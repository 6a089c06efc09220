"""Answers to prompts at temperature 1: ours, or ``model.generate``, in bf16 or float32.

All draw different random numbers, so answers differ; real tokens of each are counted, the one that ends an answer
included, and mean lengths stand beside the speed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache

from benchmarks.grid import STATIC_COMPILED
from benchmarks.measure import device, matmul_peak, synchronise, write_result
from benchmarks.setting import read_json

Answers = list[list[int]]
Answer = Callable[[int, int], Answers]
"""Called with a seed and a number of tokens; returns an answer of at most that length to each prompt."""
WARM_UP_TOKENS = 4


def main(task_file: Path) -> None:
    """Samples once a seed and writes the result."""
    task = read_json(task_file)
    dtype = getattr(torch, task["dtype"])
    peak = matmul_peak(dtype)
    end = AutoTokenizer.from_pretrained(task["base"]).eos_token_id
    attention = task["setting"].get("attention", "sdpa")
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=dtype, attn_implementation=attention)
    model = model.to(device()).eval()
    prompts: list[list[int]] = read_json(Path(task["tokens"]))
    if task["contestant"].startswith("ours"):
        answer = _ours(model, prompts, end)
    else:
        common = common_length(prompts) if task["size"]["system_tokens"] else 0
        answer = in_batches(
            prompts,
            task["setting"]["batch"],
            lambda part: _by_generate(model, part, end, common=common, cache=task["setting"].get("cache", "dynamic")),
        )
    seconds, lengths = measured(answer, task["size"], end)
    write_result(Path(task["result"]), peak=peak, seconds=seconds, losses=[], lengths=lengths)


def measured(
    answer: Answer, size: dict[str, Any], end: int, before_each: Callable[[], None] = lambda: None
) -> tuple[list[float], list[list[int]]]:
    """Seconds and real lengths of the answers for each seed, after a short call as a warm-up."""
    answer(0, WARM_UP_TOKENS)
    seconds, lengths = [], []
    for seed in size["seeds"]:
        before_each()
        synchronise()
        started = time.perf_counter()
        answers = answer(seed, size["new_tokens"])
        synchronise()
        seconds.append(time.perf_counter() - started)
        lengths.append([real_length(row, end) for row in answers])
    return seconds, lengths


def common_length(prompts: list[list[int]]) -> int:
    """Tokens with which all prompts begin, and after which each has at least one more."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def real_length(answer: list[int], end: int) -> int:
    """Tokens up to and including the first ``end``; all of them where there is none."""
    return answer.index(end) + 1 if end in answer else len(answer)


def _ours(model: Any, prompts: list[list[int]], end: int) -> Answer:
    from alignment.models.forward.flat import use_flat_attention
    from alignment.models.forward.generate import Sampling, generate

    use_flat_attention(model)

    def answer(seed: int, limit: int) -> Answers:
        rng = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts), limit, generator=rng, dtype=torch.float64)
        sampling = Sampling(temperature=1.0, uniforms=uniforms)
        return generate(model, prompts, max_new_tokens=limit, end_ids=[end], batch_size=len(prompts), sampling=sampling)

    return answer


def in_batches(prompts: list[list[int]], size: int, answer_of: Callable[[list[list[int]]], Answer]) -> Answer:
    """Answers in batches of ``size`` prompts, one after another. Each batch draws with a seed of its own."""
    parts = [answer_of(prompts[first : first + size]) for first in range(0, len(prompts), size)]

    def answer(seed: int, limit: int) -> Answers:
        return [row for number, part in enumerate(parts) for row in part(seed + 1000 * number, limit)]

    return answer


def _by_generate(model: Any, prompts: list[list[int]], end: int, *, common: int, cache: str = "dynamic") -> Answer:
    """``common`` tokens with which all prompts begin are read once; padding stands behind them."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [prompt[:common] + [end] * gap + prompt[common:] for prompt, gap in zip(prompts, padding, strict=True)]
    masks = [[1] * common + [0] * gap + [1] * (longest - common - gap) for gap in padding]
    ids, real = torch.tensor(rows, device=device()), torch.tensor(masks, device=device())

    def beginning() -> dict[str, Any]:
        if not common:
            return {}
        known = DynamicCache(config=model.config)
        model(input_ids=ids[:1, :common], cache=known, use_cache=True, logits_to_keep=1)
        known.batch_repeat_interleave(len(prompts))
        return {"cache": known}

    def answer(seed: int, limit: int) -> Answers:
        torch.manual_seed(seed)
        with torch.no_grad():
            answered = model.generate(
                input_ids=ids,
                attention_mask=real,
                max_new_tokens=limit,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=end,
                pad_token_id=end,
                **cache_options(cache),
                **beginning(),
            )
        answers: Answers = answered[:, longest:].tolist()
        return answers

    return answer


def cache_options(cache: str) -> dict[str, Any]:
    """What ``generate`` is told about its cache."""
    if cache == "dynamic":
        return {}
    if cache == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    assert cache == STATIC_COMPILED, f"no cache {cache!r} in the grid"
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True  # else only GPUs compile
    return {"cache_implementation": "static", "compile_config": compiled}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
