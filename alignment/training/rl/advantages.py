"""Turns scores of answers into advantages of tokens: a protocol, and the estimator that PPO uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from alignment.algos.gae import advantages_and_returns, leave_one_out, token_rewards
from alignment.algos.masked import center_and_scale, scale_only


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """The result of an estimator; all ``[rows, tokens]`` float32, zero outside the response mask.

    ``raw`` are the unscaled advantages, ``whitened`` those that the policy learns from, and ``returns`` the targets of
    the value model.
    """

    raw: Tensor
    whitened: Tensor
    returns: Tensor


class AdvantageEstimator(Protocol):
    """Computes the advantages of a rollout batch, the same on every process."""

    def estimate(
        self, *, scores: Tensor, kl: Tensor, values: Tensor, response_mask: Tensor, kl_coefficient: float
    ) -> Advantages:
        """The advantages of a batch, in which answers to the same prompt are in adjacent rows.

        ``scores`` are ``[rows]``; ``kl`` (k1 estimates in nats), ``values`` and ``response_mask`` (True on the tokens
        of an answer) are ``[rows, tokens]``.
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
        self, *, scores: Tensor, kl: Tensor, values: Tensor, response_mask: Tensor, kl_coefficient: float
    ) -> Advantages:
        """Advantages over all tokens of the batch, and returns as values plus advantages."""
        if self.baseline_group is not None:
            scores = leave_one_out(scores, self.baseline_group)
        rewards = token_rewards(scores, kl, response_mask, kl_coefficient=kl_coefficient)
        if self.whiten_rewards:
            rewards = scale_only(rewards, response_mask)
        raw, returns = advantages_and_returns(
            rewards, values, response_mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        return Advantages(raw=raw, whitened=center_and_scale(raw, response_mask), returns=returns)
