"""PPO's clipped losses (Schulman et al. 2017, eq. 7; value clipping as in Huang et al. 2024).

The losses are sums over counted tokens; the caller divides by the tokens of the whole minibatch over all micro-batches
and processes, so that neither changes the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Per-token log π/π_old, clamped so that its exponential stays finite."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def answer_log_ratio(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """``[rows, 1]`` log π/π_old of whole answers, the sum over counted tokens, clamped like that of a token."""
    change = ((logprobs - old_logprobs) * response_mask).sum(-1, keepdim=True)
    return change.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_policy_loss(
    ratio: Tensor, advantages: Tensor, weights: Tensor, *, clip: float, clip_high: float | None = None
) -> Tensor:
    """Weighted sum of max(−A·ratio, −A·clip(ratio, 1 − clip, 1 + clip_high)).

    ``weights`` is a mask, or what each token counts. ``clip_high`` is ``clip`` if None; a larger one lets unlikely
    tokens gain more (Yu et al. 2025, section 3.1).
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    return (torch.maximum(plain, clipped) * weights).sum()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, *, clip: float | None
) -> Tensor:
    """Sum of ½·max((V − G)², (V_old + clip(V − V_old, ± clip) − G)²) over counted tokens.

    Without a clip it is the sum of ½·(V − G)².
    """
    if clip is None:
        return 0.5 * ((values - returns) ** 2 * response_mask).sum()
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    worst = torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)
    return 0.5 * (worst * response_mask).sum()


def value_is_clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Boolean, in the arguments' shape: True where the clipped error is larger, so the value gets no gradient."""
    if clip is None:
        return torch.zeros_like(values, dtype=torch.bool)
    change = values - old_values
    clipped_values = old_values + change.clamp(-clip, clip)
    return (change.abs() > clip) & ((clipped_values - returns) ** 2 > (values - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 − Var(G − V) / Var(G) over counted tokens; 0 if the returns do not vary."""
    counted = response_mask.bool().nonzero(as_tuple=True)  # found once, because it makes the host wait for a GPU
    spread = returns[counted].var(unbiased=False)
    if float(spread) == 0.0:
        return 0.0
    return float(1.0 - (returns[counted] - values[counted]).var(unbiased=False) / spread)
