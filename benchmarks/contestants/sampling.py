"""What the contestants that sample answers at temperature 1 have in common.

All draw different random numbers, so answers differ; real tokens of each are counted, the one that ends an answer
included, and mean lengths stand beside the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import device, matmul_peak, synchronise, write_result
from benchmarks.setting import read_json

Answers = list[list[int]]
Answer = Callable[[int, int], Answers]
"""Called with a seed and a number of tokens; returns an answer of at most that length to each prompt."""
Sampler = Callable[[Any, list[list[int]], int], Answer]
"""Called with a model, the tokens of the prompts, and the token that ends an answer."""
WARM_UP_TOKENS = 4
"""Tokens of the answers that are sampled first, if nothing is compiled."""


def sample(task: dict[str, Any], sampler: Sampler, *, attention: str = "sdpa", warm_up: int = WARM_UP_TOKENS) -> None:
    """Loads the model in the task's number format, samples once a seed and writes the result."""
    dtype = getattr(torch, task["dtype"])
    peak = matmul_peak(dtype)
    end = AutoTokenizer.from_pretrained(task["base"]).eos_token_id
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=dtype, attn_implementation=attention)
    prompts: list[list[int]] = read_json(Path(task["tokens"]))
    answer = sampler(model.to(device()).eval(), prompts, end)
    seconds, lengths = measured(answer, task["size"], end, warm_up=warm_up)
    write_result(Path(task["result"]), peak=peak, seconds=seconds, losses=[], lengths=lengths)


def measured(
    answer: Answer,
    size: dict[str, Any],
    end: int,
    *,
    warm_up: int = WARM_UP_TOKENS,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[list[int]]]:
    """Seconds and real lengths of the answers for each seed, after a call for ``warm_up`` tokens."""
    answer(0, warm_up)
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


def real_length(answer: list[int], end: int) -> int:
    """Tokens up to and including the first ``end``; all of them where there is none."""
    return answer.index(end) + 1 if end in answer else len(answer)
