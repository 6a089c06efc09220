"""Measures a card alone: ``python -m benchmarks.gpu_check.speed`` prints a line of JSON.

Products of bfloat16 matrices, copies in the card's memory, and greedy answers of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from alignment.pipeline.sources.bundled_model import ensure, lookup
from benchmarks.measure import device, peak_memory, synchronise

_TRIES = 5
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 96, 64


def _best_seconds(work: Callable[[], object]) -> float:
    """Of several tries, after one that is not counted."""
    best = float("inf")
    for number in range(_TRIES + 1):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        if number:
            best = min(best, time.perf_counter() - started)
    return best


def products(side: int) -> float:
    """TFLOP/s of products of bfloat16 matrices, ``side`` × ``side``."""
    left, right = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: left @ right) / 1e12


def copies(megabytes: int) -> float:
    """GB/s that are read and written together."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * len(source) / _best_seconds(lambda: target.copy_(source)) / 1e9


def answers(folder: Path) -> tuple[float, int]:
    """Tokens a second of greedy answers in bfloat16, and how many there were; every answer has its full length."""
    model = load_policy(Lineage(source="path:model", base=folder, adapters=()), torch.bfloat16).to(device())
    use_flat_attention(model)
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=rng).tolist()
    seconds = _best_seconds(lambda: generate(model, prompts, max_new_tokens=NEW_TOKENS, end_ids=(), batch_size=PROMPTS))
    return PROMPTS * NEW_TOKENS / seconds, PROMPTS * NEW_TOKENS


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.speed", description=__doc__)
    parser.add_argument("--side", type=int, default=8192, help="of the matrices")
    parser.add_argument("--megabytes", type=int, default=2048, help="that are copied at once")
    parser.add_argument("--model", type=Path, help="a model's folder; SmolLM2-135M if not given")
    options = parser.parse_args(argv)
    model = options.model or ensure(lookup("smollm2-135m"), announce=lambda line: print(line, file=sys.stderr))
    tokens, count = answers(model)
    figures = {
        f"products of bfloat16 matrices, side {options.side}, TFLOP/s": round(products(options.side), 2),
        "copies on the card, GB/s read and written": round(copies(options.megabytes), 1),
        f"greedy answers, tokens a second ({count} tokens, {PROMPTS} at once)": round(tokens, 1),
        "peak memory, GB": round(peak_memory()[0] / 1e9, 2),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
