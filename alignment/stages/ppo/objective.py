"""Advantages and the policy's objective on a micro-batch of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from alignment.algos.ppo import (
    advantages_and_returns,
    answer_log_ratio,
    center_and_scale,
    clipped_policy_loss,
    k3,
    leave_one_out,
    log_ratio,
    scale_only,
    token_rewards,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """The result of an estimator; all ``[rows, tokens]`` float32, zero outside the response mask.

    ``raw`` are the unscaled advantages, ``learned`` those that the policy learns from, and ``returns`` the targets of
    the value model; None without one.
    """

    raw: Tensor
    learned: Tensor
    returns: Tensor | None


class AdvantageEstimator(Protocol):
    """Computes the advantages of a rollout batch, the same on every process."""

    def estimate(
        self, *, scores: Tensor, kl: Tensor, values: Tensor | None, response_mask: Tensor, kl_coefficient: float
    ) -> Advantages:
        """The advantages of a batch, in which answers to the same prompt are in adjacent rows.

        ``scores`` are ``[rows]``; ``kl`` (k1 estimates in nats), ``values`` (None without a critic) and
        ``response_mask`` (True on the tokens of an answer) are ``[rows, tokens]``. ``kl_coefficient`` is that of the KL
        in the reward: 0 if the KL is in the loss.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Gae:
    """Generalised advantage estimation (Schulman et al. 2016) with the KL in the reward of each token.

    ``baseline_group`` is the number of answers to a prompt; the mean score of the other answers to the same prompt is
    subtracted from each score. None subtracts nothing. ``whiten_rewards`` divides the rewards of tokens by their
    standard deviation.
    """

    gamma: float
    gae_lambda: float
    baseline_group: int | None
    whiten_rewards: bool

    def estimate(
        self, *, scores: Tensor, kl: Tensor, values: Tensor | None, response_mask: Tensor, kl_coefficient: float
    ) -> Advantages:
        """Advantages over all tokens of the batch, and returns as values plus advantages."""
        assert values is not None, "a plan refuses this estimator without a critic"
        if self.baseline_group is not None:
            scores = leave_one_out(scores, self.baseline_group)
        rewards = token_rewards(scores, kl, response_mask, kl_coefficient=kl_coefficient)
        if self.whiten_rewards:
            rewards = scale_only(rewards, response_mask)
        raw, returns = advantages_and_returns(
            rewards, values, response_mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        return Advantages(raw=raw, learned=center_and_scale(raw, response_mask), returns=returns)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRelative:
    """One advantage for a whole answer, by comparison with the other answers to its prompt; no critic is used.

    ``group`` is the number of answers to a prompt. ``compare`` turns ``[rows]`` rewards of answers into advantages; the
    KL of an answer, summed over its tokens, is a part of its reward.
    """

    group: int
    compare: Callable[[Tensor, int], Tensor]

    def estimate(
        self, *, scores: Tensor, kl: Tensor, values: Tensor | None, response_mask: Tensor, kl_coefficient: float
    ) -> Advantages:
        """The answer's advantage on each of its tokens."""
        rewards = scores - kl_coefficient * (kl * response_mask).sum(-1)
        advantages = self.compare(rewards, self.group)[:, None] * response_mask
        return Advantages(raw=advantages, learned=advantages, returns=None)


class Average(str, Enum):
    """How the terms of tokens become the loss of a minibatch.

    ``tokens`` is the mean over all tokens. The others are means over answers: of the mean over an answer's tokens
    (``token_means``), of their sum (``token_sums``), or of their sum divided by a constant (``constant_length``).
    """

    tokens = "tokens"
    token_means = "token_means"
    token_sums = "token_sums"
    constant_length = "constant_length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a micro-batch's answers were when they were sampled: ``[rows, tokens]`` float32, zero outside the mask.

    ``importance`` multiplies the policy's term of each token, or of a whole answer in its first token; None is 1.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    response_mask: Tensor
    importance: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """A micro-batch's share of the loss.

    ``total`` is what the policy learns from. ``policy`` and ``kl`` are its terms, without coefficients and gradients;
    ``kl`` is None if the KL is not in the loss. ``change`` is log π/π_old of tokens, ``[rows, tokens]``; ``ratio`` are
    the ratios that were clipped, in the same shape. Neither carries gradients.
    """

    total: Tensor
    policy: Tensor
    kl: Tensor | None
    change: Tensor
    ratio: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyObjective:
    """The objective of a method.

    ``clip`` and ``clip_high`` are how far a ratio may fall below 1 and rise above it. With ``whole_answers`` the ratio
    is that of an answer's probability, else of a token's. ``max_new_tokens`` is the constant of
    ``Average.constant_length``. With ``kl_in_loss`` the k3 estimate of the KL is added, with its gradient, averaged as
    the policy's terms are. ``entropy_coefficient`` times the mean entropy of all tokens is subtracted.
    """

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
        must not count.
        """
        mask, advantages, importance = sampled.response_mask, sampled.advantages, sampled.importance
        change = log_ratio(logprobs, sampled.logprobs)
        if self.whole_answers:
            ratio = answer_log_ratio(logprobs, sampled.logprobs, mask).exp()
            weights, advantages = torch.ones_like(ratio), advantages[:, :1]  # an answer has one advantage
            importance = None if importance is None else importance[:, :1]
        else:
            ratio, weights = change.exp(), self._weights(mask)
        if importance is not None:
            weights = weights * importance
        clipped = clipped_policy_loss(ratio, advantages, weights, clip=self.clip, clip_high=self.clip_high)
        policy = total = clipped / divisor
        kl = None
        if self.kl_in_loss:
            kl = (k3(logprobs, sampled.reference_logprobs) * self._weights(mask)).sum() / divisor
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
