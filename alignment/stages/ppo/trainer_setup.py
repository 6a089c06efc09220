"""Builds the models and the trainer of a stage from its configuration, and tries sizes of micro-batches on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, cycle, islice

import torch
from transformers import TrainingArguments

from alignment.algos.ppo import AdaptiveKl, FixedKl, KlController
from alignment.config.faults import refuse
from alignment.config.optim import tokens_of
from alignment.config.scoring import ScorerConfig
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.modules import recompute
from alignment.models.assembly.roles import Roles, build_roles
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.rows import SHORTEST_SHARED
from alignment.rewards.scorer_sources import REWARD
from alignment.rewards.scorers import Rewards
from alignment.stages.ppo.checks import size_faults
from alignment.stages.ppo.config import Advantage, KlConfig, KlControl, KlTerm, PpoConfig
from alignment.stages.ppo.engine import PolicyEngine, RolloutEngine
from alignment.stages.ppo.experience import Experience, Prompts, Samples, partition_of, response_mask
from alignment.stages.ppo.learn import Ptx
from alignment.stages.ppo.objective import Average, PolicyObjective
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


Prompt = Sequence[int]


class AnswerTrials:
    """``Trials`` (training/size_search.py) of a trainer whose optimiser is ready and whose models may be spoiled. A row
    is a prompt with an answer of ``max_new_tokens`` random tokens. The longest prompt comes first and then the shortest
    ones, each with all answers of its group: then as many tokens as possible are those of answers."""

    def __init__(self, trainer: PpoTrainer) -> None:
        self._trainer = trainer
        self._world_size = trainer.context.world_size
        ascending = sorted(trainer.episodes.prompts.ids, key=len)
        self._prompts = [ascending[-1], *ascending[:-1]]

    def bounds(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the largest share of a minibatch that a process can have."""
        tokens = self._counted(self._rows())
        return tokens[0], sum(tokens)

    def least_step(self) -> int:
        """Takes a step on the shortest row; returns its tokens."""
        return self._step([min(self._prompts, key=len)], limit=1)

    def step(self, limit: int) -> int:
        """Takes a step on the largest micro-batch of at most ``limit`` tokens; returns its tokens."""
        rows = self._rows()
        number = sum(tokens <= limit for tokens in accumulate(self._counted(rows)))
        return self._step(rows[: max(1, number)], limit=limit)

    def _rows(self) -> list[Prompt]:
        episodes = self._trainer.episodes
        minibatch = math.ceil(episodes.prompts_per_update / self._trainer.config.num_minibatches)
        share = math.ceil(minibatch / self._world_size)
        return [prompt for prompt in islice(cycle(self._prompts), share) for _ in range(episodes.group)]

    def _counted(self, rows: Sequence[Prompt]) -> list[int]:
        """The tokens of each row, as micro-batches count them: a prompt that follows an equal one costs none."""
        answer = self._trainer.episodes.max_new_tokens
        shared = [
            row is before and len(row) >= SHORTEST_SHARED for row, before in zip(rows, [None, *rows], strict=False)
        ]
        return [answer + len(row) * (not is_shared) for row, is_shared in zip(rows, shared, strict=True)]

    def _step(self, rows: list[Prompt], *, limit: int) -> int:
        trainer = self._trainer
        model, everywhere = trainer.model_wrapped, [row for row in rows for _ in range(self._world_size)]
        tokens = max(limit, sum(self._counted(rows)))
        episodes = replace(trainer.episodes, micro_batch_tokens=tokens)
        model.eval()
        recompute(model)
        replace(trainer.learner, episodes=episodes).learn(
            model,
            self._experience(everywhere, tokens=tokens),
            0,
            update=trainer.config.critic_warmup,  # from here on the policy learns too
            step=0,
        )
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return sum(self._counted(rows))

    def _experience(self, prompts: Sequence[Prompt], *, tokens: int) -> Experience:
        """Answers as an update learns from them, in one micro-batch; their numbers mean nothing."""
        trainer = self._trainer
        width = trainer.episodes.max_new_tokens
        vocabulary = unwrapped(trainer.roles.policy).get_input_embeddings().num_embeddings
        answers = torch.randint(vocabulary, (len(prompts), width)).tolist()
        zeros = torch.zeros(len(prompts), width)
        has_critic = trainer.roles.actor_critic.value is not None
        experience = Experience(
            prompts=prompts,
            answers=answers,
            response_mask=response_mask(answers),
            logprobs=zeros,
            reference_logprobs=zeros,
            values=zeros if has_critic else None,
            scores=zeros[:, 0],
            advantages=zeros + 1.0,
            importance=None,
            returns=zeros if has_critic else None,
            partition=partition_of(
                prompts,
                answers,
                range(len(prompts)),
                group=1,
                num_minibatches=1,
                world_size=self._world_size,
                tokens=tokens,
            ),
            kl_coefficient=trainer.kl_controller.coefficient,
        )
        return experience.to(trainer.args.device)
