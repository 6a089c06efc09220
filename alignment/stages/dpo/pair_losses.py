"""The losses of pairs that TRL's trainer lacks, and the terms that are added to its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from alignment.algos import preferences
from alignment.stages.dpo.config import DpoConfig, DpoLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogprobs:
    """``[pairs]`` log-probabilities of answers in nats, and the tokens of each answer.

    The reference's are 0 for a loss without a reference. ``margins`` are score differences, if the rows have them.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    margins: Tensor | None = None

    @property
    def mean_chosen(self) -> Tensor:
        """log p(chosen) divided by its tokens."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        """log p(rejected) divided by its tokens."""
        return self.rejected / self.rejected_tokens

    def gaps(self, beta: float, *, by_token: bool) -> Tensor:
        """β times the log-ratio of the chosen answer, less that of the rejected one; sums, or means ``by_token``."""
        chosen, rejected = self.chosen - self.reference_chosen, self.rejected - self.reference_rejected
        if by_token:
            chosen, rejected = chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return beta * (chosen - rejected)


PairLoss = Callable[[PairLogprobs], Tensor]
"""A loss for each pair."""
RewardsOf = Callable[[PairLogprobs], tuple[Tensor, Tensor]]
"""By what answers are ranked: ``[pairs]`` of the chosen and of the rejected ones."""


def own_loss(config: DpoConfig) -> PairLoss | None:
    """The loss of these settings without ``nll_weight``; None if TRL's trainer has it."""
    by_token = config.loss is DpoLoss.sigmoid_norm
    if config.loss is DpoLoss.simpo:
        return partial(_simpo, beta=config.beta, target_margin=config.target_margin or 0.0)
    if config.loss is DpoLoss.orpo:
        return partial(_orpo, odds_weight=config.odds_weight)
    if config.label_smoothing and config.loss is not DpoLoss.robust:
        return partial(_conservative, beta=config.beta, by_token=by_token, flipped=config.label_smoothing)
    if config.margin:
        return partial(_with_margin, beta=config.beta, weight=config.margin)
    return None


def implicit_rewards(config: DpoConfig) -> RewardsOf | None:
    """By what a loss without a reference ranks answers, chosen and rejected; None for TRL's β times log-ratio."""
    if config.loss is DpoLoss.simpo:
        return lambda pairs: (config.beta * pairs.mean_chosen, config.beta * pairs.mean_rejected)
    if config.loss is DpoLoss.orpo:
        return lambda pairs: (preferences.log_odds(pairs.mean_chosen), preferences.log_odds(pairs.mean_rejected))
    return None


def nll_of_chosen(pairs: PairLogprobs) -> Tensor:
    """−log p(chosen) divided by its tokens (Pang et al. 2024); TRL's is a mean over all tokens of a micro-batch."""
    return -pairs.mean_chosen


def _conservative(pairs: PairLogprobs, *, beta: float, by_token: bool, flipped: float) -> Tensor:
    return preferences.conservative(pairs.gaps(beta, by_token=by_token), flipped=flipped)


def _with_margin(pairs: PairLogprobs, *, beta: float, weight: float) -> Tensor:
    assert pairs.margins is not None, "the rows have no margins"
    return preferences.offset(pairs.gaps(beta, by_token=False), weight * pairs.margins)


def _simpo(pairs: PairLogprobs, *, beta: float, target_margin: float) -> Tensor:
    return preferences.simpo(pairs.mean_chosen, pairs.mean_rejected, beta=beta, target_margin=target_margin)


def _orpo(pairs: PairLogprobs, *, odds_weight: float) -> Tensor:
    """The negative log-likelihood of the chosen answer, and λ times the odds-ratio loss (Hong et al. 2024, eq. 6)."""
    ratio = preferences.odds_ratio(pairs.mean_chosen, pairs.mean_rejected)
    return nll_of_chosen(pairs) + odds_weight * ratio
