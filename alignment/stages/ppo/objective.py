"""Advantages and the policy's objective on a micro-batch of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from alignment.algos import ppo
from alignment.stages.ppo.config import Advantage, PpoConfig

COMPARISONS: dict[Advantage, Callable[[Tensor, int], Tensor]] = {
    Advantage.rloo: ppo.leave_one_out,
    Advantage.grpo: ppo.group_standardized,
    Advantage.dr_grpo: ppo.group_centered,
}
"""How the answers to a prompt are compared, without a critic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """What the answers of a batch are worth; all ``[rows, tokens]`` float32, zero outside the response mask. ``raw``
    are the unscaled advantages, ``learned`` those that the policy learns from, and ``returns`` the targets of the value
    model; None without one."""

    raw: Tensor
    learned: Tensor
    returns: Tensor | None


def advantages_of(
    config: PpoConfig,
    *,
    scores: Tensor,
    kl: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    kl_coefficient: float,
) -> Advantages:
    """The advantages of a batch, in which answers to the same prompt are in adjacent rows; the same on every process.
    ``scores`` are ``[rows]``; ``kl`` (k1 estimates in nats), ``values`` (None without a critic) and ``response_mask``
    (True on the tokens of an answer) are ``[rows, tokens]``. ``kl_coefficient`` is that of the KL in the reward: 0 if
    the KL is in the loss. ``Advantage.gae`` is generalised advantage estimation (Schulman et al. 2016) with the KL in
    the reward of each token. The others give each token the advantage of its answer, whose reward has the KL summed
    over its tokens."""
    group = config.completions_per_prompt
    if config.advantage is not Advantage.gae:
        rewards = scores - kl_coefficient * (kl * response_mask).sum(-1)
        advantages = COMPARISONS[config.advantage](rewards, group)[:, None] * response_mask
        return Advantages(raw=advantages, learned=advantages, returns=None)
    assert values is not None, "a plan refuses this advantage without a critic"
    if config.prompt_baseline:
        scores = ppo.leave_one_out(scores, group)
    rewards = ppo.token_rewards(scores, kl, response_mask, kl_coefficient=kl_coefficient)
    if config.whiten_rewards:
        rewards = ppo.scale_only(rewards, response_mask)
    raw, returns = ppo.advantages_and_returns(
        rewards, values, response_mask, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    return Advantages(raw=raw, learned=ppo.center_and_scale(raw, response_mask), returns=returns)


class Average(str, Enum):
    """How the terms of tokens become the loss of a minibatch. ``tokens`` is the mean over all tokens. The others are
    means over answers: of the mean over an answer's tokens (``token_means``), of their sum (``token_sums``), or of
    their sum divided by a constant (``constant_length``)."""

    tokens = "tokens"
    token_means = "token_means"
    token_sums = "token_sums"
    constant_length = "constant_length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a micro-batch's answers were when they were sampled: ``[rows, tokens]`` float32, zero outside the mask.
    ``importance`` multiplies the policy's term of each token, or of a whole answer in its first token; None is 1."""

    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    response_mask: Tensor
    importance: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """A micro-batch's share of the loss. ``total`` is what the policy learns from. ``policy`` and ``kl`` are its terms,
    without coefficients and gradients; ``kl`` is None if the KL is not in the loss. ``change`` is log π/π_old of
    tokens, ``[rows, tokens]``; ``ratio`` are the ratios that were clipped, in the same shape. Neither carries
    gradients."""

    total: Tensor
    policy: Tensor
    kl: Tensor | None
    change: Tensor
    ratio: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyObjective:
    """The objective of a method. ``clip`` and ``clip_high`` are how far a ratio may fall below 1 and rise above it.
    With ``whole_answers`` the ratio is that of an answer's probability, else of a token's. ``max_new_tokens`` is the
    constant of ``Average.constant_length``. With ``kl_in_loss`` the k3 estimate of the KL is added, with its gradient,
    averaged as the policy's terms are. ``entropy_coefficient`` times the mean entropy of all tokens is subtracted."""

    average: Average
    whole_answers: bool
    clip: float
    clip_high: float
    max_new_tokens: int
    kl_in_loss: bool
    entropy_coefficient: float

    def divisor(self, response_mask: Tensor) -> Tensor:
        """What a minibatch's sum is divided by, a scalar; ``response_mask`` is that of the whole minibatch."""
        if self.average is Average.tokens:
            return response_mask.sum().float()
        answers = torch.full((), float(len(response_mask)), device=response_mask.device)
        return answers * self.max_new_tokens if self.average is Average.constant_length else answers

    def loss(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        sampled: Sampled,
        *,
        kl_coefficient: float,
        divisor: Tensor,
        tokens: Tensor,
    ) -> PolicyLoss:
        """A micro-batch's share. ``logprobs`` and ``entropy`` are ``[rows, tokens]`` of the policy as it is now.
        ``divisor`` is the minibatch's, and ``tokens`` the number of its answer tokens; both are infinite for rows that
        must not count."""
        mask, advantages, importance = sampled.response_mask, sampled.advantages, sampled.importance
        change = ppo.log_ratio(logprobs, sampled.logprobs)
        if self.whole_answers:
            ratio = ppo.answer_log_ratio(logprobs, sampled.logprobs, mask).exp()
            weights, advantages = torch.ones_like(ratio), advantages[:, :1]  # an answer has one advantage
            importance = None if importance is None else importance[:, :1]
        else:
            ratio, weights = change.exp(), self._weights(mask)
        if importance is not None:
            weights = weights * importance
        clipped = ppo.clipped_policy_loss(ratio, advantages, weights, clip=self.clip, clip_high=self.clip_high)
        policy = total = clipped / divisor
        kl = None
        if self.kl_in_loss:
            kl = (ppo.k3(logprobs, sampled.reference_logprobs) * self._weights(mask)).sum() / divisor
            total = total + kl_coefficient * kl
        if self.entropy_coefficient:
            total = total - self.entropy_coefficient * (entropy * mask).sum() / tokens
        return PolicyLoss(
            total=total,
            policy=policy.detach(),
            kl=None if kl is None else kl.detach(),
            change=change.detach(),
            ratio=ratio.detach().expand_as(mask),
        )

    def _weights(self, response_mask: Tensor) -> Tensor:
        """``[rows, tokens]``: what each token counts before the division by the minibatch's number."""
        if self.average is Average.token_means:
            return response_mask / response_mask.sum(-1, keepdim=True)
        return response_mask
