"""The formulas of PPO and its kin: advantages, KL, clipped losses, importance weights and penalties of length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coefficient: float) -> Tensor:
    """``[rows, tokens]``: minus the KL penalty on every counted token, plus the score on the last one.

    Args:
        scores: ``[rows]``, one per whole answer.
        kl: ``[rows, tokens]`` k1 estimates.
        response_mask: True on answer tokens up to and including EOS; answers are left-aligned in a row."""
    rewards = -kl_coefficient * kl * response_mask
    last = response_mask.sum(-1) - 1
    return rewards.scatter_add(-1, last[:, None], scores[:, None].to(rewards.dtype))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages (not yet whitened) and returns, both ``[rows, tokens]`` and zero outside the mask. ``values[t]`` is
    the value before token ``t`` is emitted. After the last counted token the value is zero."""
    values = values * response_mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        running = (delta + gamma * gae_lambda * running) * response_mask[:, step]
        advantages[:, step] = running
        next_value = values[:, step]
    return advantages, (advantages + values) * response_mask


STD_OFFSET = 1e-4
"""Added to a group's standard deviation, so that equal scores give advantages of 0. The usual value."""


def leave_one_out(scores: Tensor, group: int) -> Tensor:
    """Each score minus the mean score of the other answers to the same prompt. A baseline that does not depend on the
    answer leaves the gradient unbiased (Ahmadian et al. 2024, section 3)."""
    grouped = scores.view(-1, group)
    others = (grouped.sum(-1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).view(-1)


def group_centered(scores: Tensor, group: int) -> Tensor:
    """Each score minus the mean score of its group (Dr. GRPO: Liu et al. 2025, section 3.2)."""
    grouped = scores.view(-1, group)
    return (grouped - grouped.mean(-1, keepdim=True)).view(-1)


def group_standardized(scores: Tensor, group: int) -> Tensor:
    """Each score minus its group's mean, divided by the group's standard deviation (Shao et al. 2024, section 4.1.2).
    The deviation is that of a sample, with ``group − 1`` in the denominator."""
    grouped = scores.view(-1, group)
    deviation = grouped.std(-1, keepdim=True) + STD_OFFSET
    return (group_centered(scores, group).view(-1, group) / deviation).view(-1)


def tied_groups(scores: Tensor, group: int) -> Tensor:
    """``[groups]`` bool: True where all answers of a group have exactly the same score."""
    grouped = scores.view(-1, group)
    return grouped.amax(-1) == grouped.amin(-1)


def truncated_importance(
    logprobs: Tensor, sampled_logprobs: Tensor, response_mask: Tensor, *, cap: float, whole_answers: bool
) -> Tensor:
    """``[rows, tokens]`` min(π/μ, cap), zero outside ``response_mask``; μ is what sampled, π what is learned.
    ``logprobs`` and ``sampled_logprobs`` are ``[rows, tokens]``. With ``whole_answers`` π and μ are the probabilities
    of answers, so all tokens of a row have one weight; else they are those of tokens."""
    change = (logprobs - sampled_logprobs) * response_mask
    if whole_answers:
        change = change.sum(-1, keepdim=True).expand_as(change)
    return change.clamp(max=math.log(cap)).exp() * response_mask


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate in nats; unbiased, may be negative."""
    return logprobs - reference_logprobs


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate in nats; unbiased, never negative."""
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedKl:
    """A constant KL coefficient."""

    coefficient: float

    def after(self, kl: float, num_episodes: int) -> FixedKl:
        """The same controller: the coefficient does not depend on the observed KL."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveKl:
    """A KL coefficient that steers the KL towards ``target`` nats per sequence (Ziegler et al. 2019, section 2.2).
    Example: at KL 12, target 6 and horizon 10,000, 256 episodes raise the coefficient by the factor 1.00512."""

    coefficient: float
    target: float
    horizon: int

    def after(self, kl: float, num_episodes: int) -> AdaptiveKl:
        """The controller after ``num_episodes`` episodes whose mean KL was ``kl`` nats per sequence."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        factor = 1.0 + error * num_episodes / self.horizon
        return AdaptiveKl(coefficient=self.coefficient * factor, target=self.target, horizon=self.horizon)


KlController = FixedKl | AdaptiveKl
"""What sets the KL coefficient of an update from the KL of earlier ones."""


def of_each_token(lengths: Tensor, penalty: float) -> Tensor:
    """``[answers]`` float64: ``penalty`` for each token of answers of ``[answers]`` tokens."""
    return penalty * lengths.double()


def of_overlong(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """``[answers]`` float64 from 0 to 1: what answers of ``[answers]`` tokens lose by coming close to ``longest``. 0 up
    to ``longest − buffer`` tokens, then rising linearly to 1 at ``longest``, and 1 beyond. It is the soft overlong
    punishment with the opposite sign (DAPO, Yu et al. 2025, eq. 13)."""
    return ((lengths.double() - (longest - buffer)) / buffer).clamp(0.0, 1.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over counted elements, a scalar. Raises ValueError: the mask counts no element."""
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
    """Weighted sum of max(−A·ratio, −A·clip(ratio, 1 − clip, 1 + clip_high)). ``weights`` is a mask, or what each token
    counts. ``clip_high`` is ``clip`` if None; a larger one lets unlikely tokens gain more (Yu et al. 2025, section
    3.1)."""
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    return (torch.maximum(plain, clipped) * weights).sum()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, *, clip: float | None
) -> Tensor:
    """Sum of ½·max((V − G)², (V_old + clip(V − V_old, ± clip) − G)²) over counted tokens. Without a clip it is the sum
    of ½·(V − G)²."""
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
