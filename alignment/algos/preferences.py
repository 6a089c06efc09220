"""Losses on preference pairs that TRL's DPO trainer lacks, as functions of ``[pairs]`` log-probabilities in nats.

``gaps`` are β times the log-ratio to the reference of the chosen answer, less that of the rejected one (Rafailov et al.
2023, eq. 7). ``mean_chosen`` and ``mean_rejected`` are log-probabilities divided by the tokens of the answer. Each
function returns a loss for each pair.
"""

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
