"""Ragged batches: every length from one token (EOS first) to the full width (no EOS)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

WIDTH = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    lengths: list[int]
    mask: Tensor
    scores: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    reference: Tensor
    values: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


LENGTHS = {
    "ragged": [3, 7, 1, 5],
    "EOS at 0 everywhere": [1, 1, 1, 1],
    "no EOS anywhere": [7, 7, 7, 7],
    "one token beside a full row": [1, 7, 1, 7],
    "random": [],
}


@pytest.fixture(params=LENGTHS)
def batch(request: pytest.FixtureRequest) -> Batch:
    return random_batch(LENGTHS[request.param], seed=len(request.param))


def random_batch(lengths: list[int], *, seed: int) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    lengths = lengths or torch.randint(1, WIDTH + 1, (6,), generator=rng).tolist()

    def draw(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(len(lengths), WIDTH, generator=rng, dtype=torch.float64)

    old = draw() - 3.0
    old_values = draw()
    return Batch(
        lengths=lengths,
        mask=torch.arange(WIDTH) < torch.tensor(lengths)[:, None],
        scores=draw()[:, 0],
        logprobs=old + draw(0.4),
        old_logprobs=old,
        reference=old + draw(0.3),
        values=old_values + draw(0.3),
        old_values=old_values,
        advantages=draw(),
        returns=draw(),
    )
