"""Importance weights for answers that another computation of the policy sampled (Yao et al. 2025)."""

from __future__ import annotations

import math

from torch import Tensor


def truncated_importance(
    logprobs: Tensor, sampled_logprobs: Tensor, response_mask: Tensor, *, cap: float, whole_answers: bool
) -> Tensor:
    """``[rows, tokens]`` min(π/μ, cap), zero outside ``response_mask``; μ is what sampled, π what is learned.

    ``logprobs`` and ``sampled_logprobs`` are ``[rows, tokens]``. With ``whole_answers`` π and μ are the probabilities
    of answers, so all tokens of a row have one weight; else they are those of tokens.
    """
    change = (logprobs - sampled_logprobs) * response_mask
    if whole_answers:
        change = change.sum(-1, keepdim=True).expand_as(change)
    return change.clamp(max=math.log(cap)).exp() * response_mask
