"""Attention with capped logits, and the order of torch's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, cap: float
) -> Tensor:
    """``[rows, tokens, heads, value width]``; scores and weights are rounded to the keys' dtype.

    Args:
        query: ``[rows, heads, tokens, width]``.
        key: ``[rows, key heads, columns, width]``.
        value: ``[rows, key heads, columns, value width]``.
        mask: ``[rows or 1, 1, tokens, columns]``, False or −∞ where a token does not see a column, else True or 0;
            without one, each token sees the columns up to its own. The result for a token that sees none, such as
            padding, is finite.
        scaling: 1/√width if None.
    """
    rows, heads, columns, width = key.shape
    tokens = query.shape[2]
    queries = query.to(key.dtype).reshape(rows, heads, -1, tokens, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = (queries @ key[:, :, None].transpose(-1, -2) * (scale / cap)).tanh() * cap
    if mask is None:
        mask = torch.ones(1, 1, tokens, columns, dtype=torch.bool, device=query.device).tril(columns - tokens)
    seen = mask if mask.dtype == torch.bool else mask == 0
    scores = scores.masked_fill(~seen[:, :, None], torch.finfo(scores.dtype).min)
    attended = torch.softmax(scores, dim=-1) @ value[:, :, None]
    return attended.flatten(1, 2).transpose(1, 2)


ORDER = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention takes the first kernel of ``ORDER`` that can serve a call. Outside CUDA this has no effect."""
    with sdpa_kernel(list(ORDER), set_priority=True):
        yield
