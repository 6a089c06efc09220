"""Draws tokens from logits by inverting the cumulative distribution at given uniform numbers."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are first summed."""


def sampled_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """``[rows]`` tokens from ``[rows, vocabulary]`` logits: the first token whose cumulative probability exceeds the
    row's number in ``uniform [rows]``, float64 in [0, 1).

    Weights are exp(z − max z) in float32. Sums of blocks are accumulated in float64, so that no sum over the whole
    vocabulary is rounded to float32. The search finds a block first, then the token in it.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    weights = torch.empty(rows, blocks * BLOCK, dtype=torch.float32, device=logits.device)
    weights[:, :vocabulary] = logits
    weights[:, vocabulary:] = float("-inf")
    weights.sub_(weights.amax(-1, keepdim=True))
    if temperature != 1.0:
        weights.div_(temperature)
    weights = weights.exp_().view(rows, blocks, BLOCK)
    block, rest = _invert(weights.sum(-1).double(), uniform)
    inside = weights[torch.arange(rows, device=block.device), block]
    return block * BLOCK + _invert(inside.double(), rest)[0]


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of ``[rows, choices]``: the choice whose share contains ``uniform``, and its position in it, in [0,
    1].

    A choice of weight 0 is never taken, not even for a ``uniform`` of 0 or 1.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, choice)
    rest = (target - (cumulative.gather(-1, choice) - weight)) / weight
    return choice.squeeze(-1), rest.clamp(0.0, 1.0).squeeze(-1)
