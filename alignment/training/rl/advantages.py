"""Turns scores of answers into advantages of tokens: a protocol, an estimator with a critic, and one without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from alignment.algos.gae import advantages_and_returns, token_rewards
from alignment.algos.group import leave_one_out
from alignment.algos.masked import center_and_scale, scale_only


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
