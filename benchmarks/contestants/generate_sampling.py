"""Answers by ``model.generate`` of transformers, in padded batches."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache

from benchmarks.contestants.sampling import WARM_UP_TOKENS, Answer, Answers, sample
from benchmarks.measure import device
from benchmarks.setting import STATIC_COMPILED, read_json


def main(task_file: Path) -> None:
    """Samples with the batch and the cache of the task's setting, and writes the result."""
    task = read_json(task_file)
    setting = task["setting"]

    def padded_batches(model: Any, prompts: list[list[int]], end: int) -> Answer:
        common = common_length(prompts) if task["size"]["system_tokens"] else 0
        return in_batches(
            prompts,
            setting["batch"],
            lambda part: _by_generate(model, part, end, common=common, cache=setting["cache"]),
        )

    # Compiled code is made for the length of a static cache, so its warm-up is as long as what is measured.
    warm_up = task["size"]["new_tokens"] if setting["cache"] == STATIC_COMPILED else WARM_UP_TOKENS
    sample(task, padded_batches, attention=setting["attention"], warm_up=warm_up)


def common_length(prompts: list[list[int]]) -> int:
    """Tokens with which all prompts begin, and after which each has at least one more."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


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
