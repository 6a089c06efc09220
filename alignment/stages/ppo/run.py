"""Proximal policy optimisation against a reward, on our own trainer (docs/design/0002)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

from alignment.algos.kl import AdaptiveKl, FixedKl, KlController
from alignment.config.faults import refuse
from alignment.config.scoring import ScorerConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import ConfigError
from alignment.data.records import Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import CONVERSATIONS, PROMPTS
from alignment.data.tokens.tokenize import TokenizedConversation, end_ids
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, refuse_other_tokenizer
from alignment.models.assembly.roles import Roles, build_roles
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation
from alignment.rewards.scorer_sources import REWARD
from alignment.rewards.slot import Rewards
from alignment.stages.ppo.batch_sizes import size_faults
from alignment.stages.ppo.config import KlConfig, KlControl, PpoConfig
from alignment.stages.ppo.kl_budget import EndsOverBudget
from alignment.stages.ppo.learn import LearnOptions
from alignment.stages.ppo.scorers_in_use import GUARD, maximised
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.stages.shared.initial import initial_policy
from alignment.stages.shared.result import StageResult, save_model
from alignment.stages.shared.stage_rows import fitting, rows_of, token_rows
from alignment.training.context import StageContext
from alignment.training.finite import refuse_weights
from alignment.training.rl.advantages import Gae
from alignment.training.rl.engine import PolicyEngine
from alignment.training.rl.guard import Guard
from alignment.training.rl.ptx import Ptx
from alignment.training.rl.rollouts import Episodes, Prompts
from alignment.training.rl.samples import Samples
from alignment.training.session import train
from alignment.training.sharding import whole_state
from alignment.training.trainer_arguments import SCHEDULES, quiet_arguments

KEPT = ("objective/score", "objective/kl", "response_length", "eos_rate", "memory/base_copies")


def run(config: PpoConfig, context: StageContext) -> StageResult:
    """A policy, prompts and whatever scores answers in, policy out."""
    spec = context.spec
    found, tokenizer = initial_policy(context)
    own = own_reward_model(context)
    if own is not None:
        refuse_other_tokenizer(spec, own, tokenizer)
    rows = rows_of(context, Prompt, config.data)
    prompts, counts = _prompts(config, context, tokenizer, rows)
    learned, held_out = hold_out(prompts, config, context)
    roles = roles_of(config, context, found, own)
    computation = Computation(device=context.device, dtype=spec.model.dtype, tokens=config.optim.micro_batch_tokens)
    made_from = (spec, tokenizer, rows, roles.reward, computation)
    trainer = build_trainer(
        config,
        context,
        roles,
        learned,
        end_ids(tokenizer),
        build_rewards(maximised(config), *made_from),
        ptx=_ptx(config, context, tokenizer),
        samples=Samples(context, tokenizer, group=config.completions_per_prompt),
    )
    if config.guard.every:
        trainer.guard = Guard(
            config.guard,
            context,
            held_out,
            scorer=build_rewards({GUARD: config.guard.scorer}, *made_from),
            policy=roles.policy,
            proxy=lambda rollout: trainer.collector.scores_of(rollout),
        )
    last = train(trainer, context, headline="objective/score", period=trainer.steps_per_update)
    metrics = {name: last[name] for name in KEPT} | counts
    metrics["updates"] = float(trainer.updates_done)
    if trainer.guard is not None:
        context.progress("held-out answers")
        roles.actor_critic.eval()
        metrics |= trainer.guard.finish(trainer.updates_done, trainer.rollouts)
    result = save_model(roles.policy, tokenizer, context, found, metrics)
    # The critic that learned last says nothing of an earlier policy.
    if metrics.get("guard/kept_update", metrics["updates"]) == metrics["updates"]:
        _save_critic(roles.actor_critic.value, context)
    return result


def roles_of(config: PpoConfig, context: StageContext, found: Lineage, own: StageInput | None) -> Roles:
    """The stage's models; ``own`` is a reward model that a stage made, if there is one."""
    return build_roles(
        context.spec,
        found,
        own,
        config.adapter,
        device=context.device,
        critic=config.critic,
        values_are_scores=_returns_are_scores(config),
    )


def _returns_are_scores(config: PpoConfig) -> bool:
    """Whether answers are worth what the reward model says of them: it alone scores, and nothing changes its scale."""
    return config.scorers == [ScorerConfig(source=REWARD)] and not config.prompt_baseline and not config.whiten_rewards


def own_reward_model(context: StageContext) -> StageInput | None:
    """The reward model, where it is an artifact of ours: the value model can then start from it."""
    reward = context.spec.inputs.get("reward")
    if reward is None or reward.path is None or read_manifest(reward.path) is None:
        return None
    return reward


def _prompts(
    config: PpoConfig, context: StageContext, tokenizer: Any, rows: list[Prompt]
) -> tuple[Prompts, dict[str, float]]:
    limits = Limits(row=config.max_prompt_length, too_long=config.too_long)
    found, counts = fitting(context, PROMPTS, rows, config.data, limits, tokenizer)
    ids = [one.rows[0]["prompt"] for one in found.values()]
    return Prompts(ids=ids, rows=list(found)), counts


def hold_out(prompts: Prompts, config: PpoConfig, context: StageContext) -> tuple[Prompts, Prompts]:
    """Prompts to learn from and prompts for the guard; a prompt that stands in several rows is on one side only.

    Raises:
        ConfigError: too few different prompts.
    """
    if not config.guard.every:
        return prompts, Prompts(ids=[], rows=[])
    different = sorted({tuple(prompt) for prompt in prompts.ids})
    number = config.guard.prompts
    if not context.world_size <= number < len(different):
        raise ConfigError(
            f"{number} prompts cannot be held out of {len(different)}, by {context.world_size} processes",
            where=f"stages.{context.spec.stage}.guard.prompts",
            remedy=f"choose {context.world_size} to {len(different) - 1}, or set guard.every to 0",
        )
    order = torch.randperm(len(different), generator=context.generator("held out")).tolist()
    chosen = {different[place] for place in order[:number]}
    held_out: dict[tuple[int, ...], int] = {}
    learned = []
    for place, prompt in enumerate(prompts.ids):
        if tuple(prompt) in chosen:
            held_out.setdefault(tuple(prompt), place)
        else:
            learned.append(place)
    return _some(prompts, learned), _some(prompts, list(held_out.values()))


def _some(prompts: Prompts, places: list[int]) -> Prompts:
    return Prompts(ids=[prompts.ids[place] for place in places], rows=[prompts.rows[place] for place in places])


def _ptx(config: PpoConfig, context: StageContext, tokenizer: Any) -> Ptx | None:
    if not config.ptx.coefficient:
        return None
    limits = Limits(row=config.max_prompt_length + config.max_new_tokens, too_long=config.too_long)
    rows, _ = token_rows(context, CONVERSATIONS, config.ptx.data, limits, tokenizer, field="ptx.data")
    learned = [TokenizedConversation(**row) for row in rows]
    return Ptx(
        learned,
        context,
        coefficient=config.ptx.coefficient,
        batch_size=config.ptx.batch_size,
        micro_batch_tokens=config.optim.micro_batch_tokens,
    )


def _save_critic(value: nn.Module, context: StageContext) -> None:
    """What was trained of the value model, for whoever wants to go on from there; the policy needs none of it."""
    refuse_weights((name, weight) for name, weight in value.named_parameters() if weight.requires_grad)
    prefix = "base_model.model." if isinstance(value, PeftModel) else ""
    trained = {name.removeprefix(prefix): p for name, p in whole_state(value, trained_only=True).items()}
    if context.is_main:
        save_file({name: p.contiguous() for name, p in trained.items()}, context.content / "critic.safetensors")


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
    ptx: Ptx | None = None,
    samples: Samples | None = None,
) -> PpoTrainer:
    """The trainer of a stage; an answer is over at one of ``end_ids``.

    Raises:
        ConfigError: episodes, prompts, processes and minibatches do not divide.
    """
    refuse(list(size_faults(config, context.world_size, f"stages.{context.spec.stage}")))
    steps_per_update = config.ppo_epochs * config.num_minibatches
    arguments = TrainingArguments(
        **quiet_arguments(context),
        per_device_train_batch_size=1,
        max_steps=config.updates * steps_per_update,
        logging_steps=steps_per_update,
        save_steps=config.save_every * steps_per_update,
        lr_scheduler_type=SCHEDULES[config.optim.schedule],
        max_grad_norm=config.optim.max_grad_norm,
        remove_unused_columns=False,
    )
    episodes = Episodes(
        prompts=prompts,
        end_ids=end_ids,
        per_update=config.optim.batch_size,
        group=config.completions_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        micro_batch_tokens=config.optim.micro_batch_tokens,
    )
    trainer = PpoTrainer(
        roles,
        config,
        context,
        episodes=episodes,
        engine=PolicyEngine(policy=roles.policy, temperature=config.temperature, end_ids=end_ids),
        rewards=rewards,
        estimator=Gae(
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            baseline_group=config.completions_per_prompt if config.prompt_baseline else None,
            whiten_rewards=config.whiten_rewards,
        ),
        learn=LearnOptions(
            clip=config.clip,
            value_clip=config.value_clip,
            value_coefficient=config.value_coefficient,
            num_minibatches=config.num_minibatches,
            critic_warmup=config.critic_warmup,
        ),
        kl_controller=kl_controller(config.kl),
        args=arguments,
        ptx=ptx,
        samples=samples,
    )
    trainer.add_callback(EndsOverBudget(lambda: trainer.over_budget))
    return trainer
