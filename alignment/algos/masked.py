"""Statistics over counted tokens. A mask is True where a token counts; denominators are mask sums."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over counted elements, a scalar.

    Raises:
        ValueError: the mask counts no element.
    """
    count = mask.sum()
    if int(count) == 0:
        raise ValueError("the mean over no tokens is not defined")
    return (values * mask).sum() / count


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Biased variance over counted elements, a scalar."""
    mean = masked_mean(values, mask)
    return masked_mean((values - mean) ** 2, mask)


def center_and_scale(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over counted elements; zero elsewhere (advantages, Huang et al. 2024)."""
    mean, variance = masked_mean(values, mask), masked_variance(values, mask)
    return (values - mean) * torch.rsqrt(variance + eps) * mask


def scale_only(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Variance 1 over counted elements with the mean kept; zero elsewhere (rewards, Huang et al. 2024)."""
    mean, variance = masked_mean(values, mask), masked_variance(values, mask)
    return ((values - mean) * torch.rsqrt(variance + eps) + mean) * mask
