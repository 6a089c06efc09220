"""The metrics of an update: those of its sampled episodes, and those of the minibatches that it learned from."""

from __future__ import annotations

import torch
from torch import Tensor

from alignment.algos.kl import k3
from alignment.algos.ppo import explained_variance
from alignment.stages.ppo.kind import SCORE_STD
from alignment.training.rl.advantages import Advantages
from alignment.training.rl.experience import ScoredBatch
from alignment.training.rl.policy_objective import PolicyLoss, PolicyObjective
from alignment.training.rl.step_metrics import UpdateMetrics


def add_scores(metrics: UpdateMetrics, batch: ScoredBatch) -> None:
    """Adds each scorer's mean score, those of ensembles and penalties, and the standard deviation of the scores that
    PPO maximises, if there are several."""
    by_scorer = {f"score/{name}": values for name, values in batch.by_scorer.by_name().items()}
    metrics.values |= {name: float(values.mean()) for name, values in (by_scorer | dict(batch.parts)).items()}
    scores = batch.scores
    if len(scores) > 1:
        # The deviation of equal scores would be that of their rounded mean.
        is_equal = bool(scores.max() == scores.min())
        metrics.values[SCORE_STD] = 0.0 if is_equal else float(scores.std(unbiased=False))


def add_episodes(
    metrics: UpdateMetrics, batch: ScoredBatch, advantages: Advantages, *, kl_coefficient: float, base_copies: float
) -> None:
    """Adds metrics of the episodes; those summed over tokens are means over episodes, the others over answer tokens."""
    mask = batch.response_mask
    kl = batch.kl.sum(-1)
    episodes = {
        "objective/kl": kl,
        "objective/kl_k3": (k3(batch.logprobs, batch.reference_logprobs) * mask).sum(-1),
        # The objective, before any baseline or scaling.
        "objective/rlhf_reward": batch.scores - kl_coefficient * kl,
        "objective/score": batch.scores,
        "eos_rate": batch.ended.float(),
        "response_length": mask.sum(-1).float(),
    }
    tokens = {"objective/entropy": batch.entropy, "val/advantages": advantages.raw}
    if batch.values is not None and advantages.returns is not None:
        tokens |= {"val/returns": advantages.returns, "val/values": batch.values}
        metrics.values["val/explained_variance"] = explained_variance(batch.values, advantages.returns, mask)
    metrics.add_means(episodes, torch.ones_like(batch.scores))
    metrics.add_means(tokens, mask)
    metrics.values["objective/kl_coef"] = kl_coefficient
    metrics.values["memory/base_copies"] = base_copies


@torch.no_grad()
def add_policy(
    metrics: UpdateMetrics,
    loss: PolicyLoss,
    objective: PolicyObjective,
    entropy: Tensor,
    response_mask: Tensor,
    *,
    tokens: Tensor,
) -> None:
    """Adds a micro-batch's share of its minibatch's metrics.

    ``entropy`` is ``[answer tokens]``, and ``tokens`` the scalar number of the minibatch's answer tokens.
    """
    over = loss.ratio - 1.0
    clipped = ((over > objective.clip_high) | (-over > objective.clip)).float()
    kl = {} if loss.kl is None else {"loss/kl": loss.kl}
    metrics.add_share(
        {
            "loss/policy": loss.policy,
            **kl,
            "policy/approxkl": (0.5 * loss.change**2 * response_mask).sum() / tokens,
            "policy/clipfrac": (clipped * response_mask).sum() / tokens,
            "policy/entropy": entropy.sum() / tokens,
            "val/ratio": (loss.ratio * response_mask).sum() / tokens,
        }
    )
    metrics.add_maximum("val/ratio_max", (loss.ratio * response_mask).max())
