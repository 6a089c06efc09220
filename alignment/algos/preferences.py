"""Losses on pairs of answers beside DPO's own, which is TRL's, and scores of an ensemble of reward models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_CERTAIN = -1e-6
"""A mean log-probability above this counts as this much: the odds of a certain answer are infinite."""


def conservative(gaps: Tensor, *, flipped: float) -> Tensor:
    """−(1 − ε) log σ(h) − ε log σ(−h): the log-loss if a share ``flipped`` of the labels is wrong (Mitchell 2023)."""
    return -(1.0 - flipped) * logsigmoid(gaps) - flipped * logsigmoid(-gaps)


def offset(gaps: Tensor, offsets: Tensor) -> Tensor:
    """−log σ(h − Δ), with an offset for each pair (Amini et al. 2024)."""
    return -logsigmoid(gaps - offsets)


def simpo(mean_chosen: Tensor, mean_rejected: Tensor, *, beta: float, target_margin: float) -> Tensor:
    """−log σ(β m_c − β m_r − γ) (Meng et al. 2024, eq. 6)."""
    return -logsigmoid(beta * (mean_chosen - mean_rejected) - target_margin)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p / (1 − p)) of an answer with p = exp(m) (Hong et al. 2024, eq. 4)."""
    logprobs = mean_logprobs.clamp(max=_CERTAIN)
    return logprobs - torch.log(-torch.expm1(logprobs))


def odds_ratio(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """−log σ(log odds of the chosen answer − log odds of the rejected one) (Hong et al. 2024, eq. 7)."""
    return -logsigmoid(log_odds(mean_chosen) - log_odds(mean_rejected))


def mean(scores: Tensor) -> Tensor:
    """``[answers]``: the mean of ``[members, answers]``."""
    return scores.mean(0)


def worst(scores: Tensor) -> Tensor:
    """``[answers]``: the lowest of ``[members, answers]``, worst-case optimisation (Coste et al. 2024, eq. 3)."""
    return scores.amin(0)


def mean_minus_std(scores: Tensor, weight: float) -> Tensor:
    """``[answers]``: the mean of ``[members, answers]`` less ``weight`` standard deviations of the members. With a
    weight of 1 it is that of Eisenstein et al. 2024 (section 5.1). The deviation is that of the members at hand, whose
    squares are divided by their number. Coste et al. 2024 (eq. 4) subtract the variance instead."""
    return mean(scores) - weight * spread(scores)


def spread(scores: Tensor) -> Tensor:
    """``[answers]``: how far ``[members, answers]`` are apart, as their standard deviation."""
    return scores.std(0, unbiased=False)
