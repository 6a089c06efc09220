"""Builds the models and the trainer of a stage from its configuration."""

from __future__ import annotations

from transformers import TrainingArguments

from alignment.algos.ppo import AdaptiveKl, FixedKl, KlController
from alignment.config.faults import refuse
from alignment.config.optim import tokens_of
from alignment.config.scoring import ScorerConfig
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.roles import Roles, build_roles
from alignment.rewards.scorer_sources import REWARD
from alignment.rewards.scorers import Rewards
from alignment.stages.ppo.checks import size_faults
from alignment.stages.ppo.config import Advantage, KlConfig, KlControl, KlTerm, PpoConfig
from alignment.stages.ppo.engine import PolicyEngine, RolloutEngine
from alignment.stages.ppo.experience import Prompts, Samples
from alignment.stages.ppo.objective import Average, PolicyObjective
from alignment.stages.ppo.ptx import Ptx
from alignment.stages.ppo.rollouts import Episodes
from alignment.stages.ppo.trainer import EndsOverBudget, PpoTrainer
from alignment.training.context import StageContext
from alignment.training.optimizer import SCHEDULES, quiet_arguments


def roles_of(config: PpoConfig, context: StageContext, start: Lineage, reward: StageInput | None) -> Roles:
    """The stage's models. The policy starts from ``start``; ``reward`` is a reward model that a stage made, or None."""
    return build_roles(
        context.spec,
        start,
        reward,
        config.adapter,
        device=context.device,
        critic=config.critic,
        # Returns are on the scale of the reward model's scores if it is the only scorer, and nothing rescales it.
        values_are_scores=config.scorers == [ScorerConfig(source=REWARD)]
        and not (config.prompt_baseline or config.whiten_rewards),
    )


def kl_controller(config: KlConfig) -> KlController:
    """The controller that the configuration names."""
    if config.control is KlControl.adaptive:
        return AdaptiveKl(coefficient=config.coefficient, target=config.target, horizon=config.horizon)
    return FixedKl(coefficient=config.coefficient)


def build_trainer(
    config: PpoConfig,
    context: StageContext,
    roles: Roles,
    prompts: Prompts,
    end_ids: frozenset[int],
    rewards: Rewards,
    *,
    engine: RolloutEngine | None = None,
    ptx: Ptx | None = None,
    samples: Samples | None = None,
) -> PpoTrainer:
    """The trainer of a stage; an answer ends at one of ``end_ids``. Without an ``engine`` the policy itself samples."""
    refuse(list(size_faults(config, context.world_size, f"stages.{context.spec.stage}")))
    trainer = PpoTrainer(
        roles,
        config,
        context,
        episodes=Episodes(
            prompts=prompts,
            end_ids=end_ids,
            per_update=config.optim.batch_size,
            group=config.completions_per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            micro_batch_tokens=tokens_of(config.optim.micro_batch_tokens),
        ),
        engine=engine or PolicyEngine(policy=roles.policy, temperature=config.temperature, end_ids=end_ids),
        rewards=rewards,
        objective=objective_of(config),
        kl_controller=kl_controller(config.kl),
        args=_arguments(config, context),
        ptx=ptx,
        samples=samples,
    )
    trainer.add_callback(EndsOverBudget(lambda: trainer.over_budget))
    return trainer


def _arguments(config: PpoConfig, context: StageContext) -> TrainingArguments:
    steps_per_update = config.ppo_epochs * config.num_minibatches
    return TrainingArguments(
        **quiet_arguments(context),
        per_device_train_batch_size=1,
        max_steps=config.updates * steps_per_update,
        logging_steps=steps_per_update,
        save_steps=config.save_every * steps_per_update,
        lr_scheduler_type=SCHEDULES[config.optim.schedule],
        max_grad_norm=config.optim.max_grad_norm,
        remove_unused_columns=False,
    )


AVERAGES = {
    Advantage.gae: Average.tokens,  # as in Huang et al. 2024
    Advantage.rloo: Average.token_sums,  # an answer is one action: Ahmadian et al. 2024, section 3
    Advantage.grpo: Average.token_means,  # Shao et al. 2024, eq. 3
    Advantage.dr_grpo: Average.constant_length,  # Liu et al. 2025, section 3.2
}
"""How the terms of tokens are averaged."""


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
