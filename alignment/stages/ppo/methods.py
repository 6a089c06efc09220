"""The estimator and the objective of each ``advantage``, from the settings of a stage."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alignment.algos.group import group_centered, group_standardized, leave_one_out
from alignment.stages.ppo.config import Advantage, KlTerm, PpoConfig
from alignment.training.rl.advantages import AdvantageEstimator, Gae, GroupRelative
from alignment.training.rl.policy_objective import Average, PolicyObjective

COMPARISONS: dict[Advantage, Callable[[Tensor, int], Tensor]] = {
    Advantage.rloo: leave_one_out,
    Advantage.grpo: group_standardized,
    Advantage.dr_grpo: group_centered,
}
"""How the answers to a prompt are compared, without a critic."""

AVERAGES = {
    Advantage.gae: Average.tokens,  # as in Huang et al. 2024
    Advantage.rloo: Average.token_sums,  # an answer is one action: Ahmadian et al. 2024, section 3
    Advantage.grpo: Average.token_means,  # Shao et al. 2024, eq. 3
    Advantage.dr_grpo: Average.constant_length,  # Liu et al. 2025, section 3.2
}
"""How the terms of tokens are averaged."""


def estimator_of(config: PpoConfig) -> AdvantageEstimator:
    """What turns scores into advantages."""
    if config.advantage is not Advantage.gae:
        return GroupRelative(group=config.completions_per_prompt, compare=COMPARISONS[config.advantage])
    return Gae(
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        baseline_group=config.completions_per_prompt if config.prompt_baseline else None,
        whiten_rewards=config.whiten_rewards,
    )


def objective_of(config: PpoConfig) -> PolicyObjective:
    """The loss of the policy."""
    return PolicyObjective(
        average=AVERAGES[config.advantage],
        whole_answers=config.advantage is Advantage.rloo,
        clip=config.clip,
        clip_high=config.clip if config.clip_high is None else config.clip_high,
        max_new_tokens=config.max_new_tokens,
        kl_in_loss=config.kl.apply_to is KlTerm.loss,
        entropy_coefficient=config.entropy_coefficient,
    )
