"""Answers by ``generate`` of this project, all prompts in one batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from benchmarks.contestants.sampling import Answer, Answers, sample
from benchmarks.setting import read_json


def one_batch(model: Any, prompts: list[list[int]], end: int) -> Answer:
    """A ``Sampler``."""
    use_flat_attention(model)

    def answer(seed: int, limit: int) -> Answers:
        rng = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts), limit, generator=rng, dtype=torch.float64)
        sampling = Sampling(temperature=1.0, uniforms=uniforms)
        return generate(model, prompts, max_new_tokens=limit, end_ids=[end], batch_size=len(prompts), sampling=sampling)

    return answer


if __name__ == "__main__":
    sample(read_json(Path(sys.argv[1])), one_batch)
