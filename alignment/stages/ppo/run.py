"""Proximal policy optimisation against a reward, with our own trainer (docs/design/0002-ppo-trainer.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from alignment.config.optim import tokens_of
from alignment.core.artifacts import read_manifest
from alignment.core.errors import ConfigError
from alignment.data.records import Prompt
from alignment.data.tokens.row_kinds import CONVERSATIONS, PROMPTS, Limits
from alignment.data.tokens.tokenize import TokenizedConversation, end_ids
from alignment.job import StageInput
from alignment.models.assembly.load import refuse_other_tokenizer
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.assembly.weight_file import write_weights
from alignment.models.forward.answers import unwrapped
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation
from alignment.stages.ppo.answer_trials import AnswerTrials
from alignment.stages.ppo.checks import GUARD, OF_ENGINE, maximised
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.engine import served_engine
from alignment.stages.ppo.experience import Prompts, Samples
from alignment.stages.ppo.guard import Guard
from alignment.stages.ppo.kind import SCORE_STD, TIED_SHARE
from alignment.stages.ppo.ptx import Ptx
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.stages.ppo.trainer_setup import build_trainer, roles_of
from alignment.stages.shared.answer_scores import asking_of
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer, refuse_base_without_scores
from alignment.stages.shared.result import StageResult, initial_policy, save_model
from alignment.stages.shared.stage_rows import fitting, rows_of, split_origins, token_rows
from alignment.training.context import StageContext
from alignment.training.finite import refuse_weights
from alignment.training.longest_batch import refuse_long_rows
from alignment.training.session import train
from alignment.training.sharding import whole_state

FROM_LAST_UPDATE = ("objective/score", "objective/kl", "response_length", "eos_rate", "memory/base_copies")
"""Metrics of the last update that are written to the manifest."""
OF_SOME = (SCORE_STD, TIED_SHARE, *OF_ENGINE)
"""Those that only some methods, engines or sizes of batches have."""


def run(config: PpoConfig, context: StageContext) -> StageResult:
    """A policy, prompts and scorers in, a policy out."""
    spec = context.spec
    start, tokenizer = initial_policy(context)
    reward = own_reward_model(context)
    if reward is not None:
        refuse_other_tokenizer(spec, reward, tokenizer)
    rows = rows_of(context, Prompt, config.data)
    prompts, counts = tokenized_prompts(config, context, tokenizer, rows)
    learned, held_out = hold_out(prompts, config, context)
    context.phase("loading")
    roles = roles_of(config, context, start, reward)
    refuse_long_prompts(config, roles.policy, prompts, rows)
    ptx = _ptx(config, context, tokenizer, roles.policy)
    computation = Computation(
        device=context.device, dtype=spec.model.dtype, tokens=tokens_of(config.optim.micro_batch_tokens)
    )
    from_stage = (spec, tokenizer, rows, roles.reward, computation, asking_of(context))
    ends = end_ids(tokenizer)
    with served_engine(config, context, roles, start, learned, held_out, end_ids=ends) as engine:
        trainer = build_trainer(
            config,
            context,
            roles,
            learned,
            ends,
            build_rewards(maximised(config), *from_stage),
            engine=engine,
            ptx=ptx,
            samples=Samples(context, tokenizer, group=config.completions_per_prompt),
        )
        if config.guard.every:
            trainer.guard = Guard(
                config.guard,
                context,
                held_out,
                scorer=build_rewards({GUARD: config.guard.scorer}, *from_stage),
                policy=roles.policy,
                proxy=trainer.collector.scores_of,
            )
        metrics = _trained(trainer, context) | counts
    result = save_model(roles.policy, tokenizer, context, start, metrics)
    # The critic belongs to the last policy, so it is not saved with an earlier one.
    value = roles.actor_critic.value
    if value is not None and metrics.get("guard/kept_update", metrics["updates"]) == metrics["updates"]:
        _save_critic(value, context)
    return result


def _trained(trainer: PpoTrainer, context: StageContext) -> dict[str, float]:
    """Trains; the metrics of the last update, and of the guard."""
    last = train(
        trainer, context, headline="objective/score", period=trainer.steps_per_update, trials=AnswerTrials(trainer)
    )
    metrics = {name: last[name] for name in FROM_LAST_UPDATE} | {name: last[name] for name in OF_SOME if name in last}
    metrics["updates"] = float(trainer.updates_done)
    if trainer.guard is not None:
        context.progress("held-out answers")
        trainer.roles.actor_critic.eval()
        metrics |= trainer.guard.finish(trainer.updates_done, trainer.rollouts)
    return metrics


def own_reward_model(context: StageContext) -> StageInput | None:
    """The stage's reward model if a stage made it, so that the value model can start from it; else None."""
    reward = context.spec.inputs.get("reward")
    if reward is None or reward.path is None or read_manifest(reward.path) is None:
        return None
    return reward


def _ptx(config: PpoConfig, context: StageContext, tokenizer: Any, policy: PreTrainedModel) -> Ptx | None:
    """The loss of conversations beside PPO's, if it is wanted."""
    if not config.ptx.coefficient:
        return None
    limits = Limits(row=config.max_prompt_length + config.max_new_tokens, too_long=config.too_long)
    rows, _ = token_rows(context, CONVERSATIONS, config.ptx.data, limits, tokenizer, field="ptx.data")
    learned, origin_of = split_origins(rows)
    refuse_long_rows(policy, learned, origin_of)
    return Ptx(
        [TokenizedConversation(**row) for row in learned],
        context,
        coefficient=config.ptx.coefficient,
        batch_size=config.ptx.batch_size,
    )


def _save_critic(value: nn.Module, context: StageContext) -> None:
    """Writes the trained weights of the value model, for further training; the policy does not need them."""
    refuse_weights((name, weight) for name, weight in value.named_parameters() if weight.requires_grad)
    prefix = "base_model.model." if isinstance(value, PeftModel) else ""
    trained = {name.removeprefix(prefix): p for name, p in whole_state(value, trained_only=True).items()}
    if context.is_main:
        write_weights(trained, context.content / "critic.safetensors")


def tokenized_prompts(
    config: PpoConfig, context: StageContext, tokenizer: Any, rows: list[Prompt]
) -> tuple[Prompts, dict[str, float]]:
    """The prompts within the length limit, and how many rows there were, were too long or were cut."""
    limits = Limits(row=config.max_prompt_length, too_long=config.too_long)
    by_row, counts = fitting(context, PROMPTS, rows, config.data, limits, tokenizer)
    ids = [tokenized.rows[0]["prompt"] for tokenized in by_row.values()]
    return Prompts(ids=ids, rows=list(by_row)), counts


def refuse_long_prompts(config: PpoConfig, policy: PreTrainedModel, prompts: Prompts, rows: Sequence[Prompt]) -> None:
    """Checks that the policy can read each prompt with the longest answer.

    Raises:
        ModelError: it cannot; the error names the longest prompt.
    """
    longest = max(range(len(prompts.ids)), key=lambda number: len(prompts.ids[number]))
    tokens = len(prompts.ids[longest]) + config.max_new_tokens
    refuse_too_long(unwrapped(policy).base_model, tokens, where=rows[prompts.rows[longest]].where)


def hold_out(prompts: Prompts, config: PpoConfig, context: StageContext) -> tuple[Prompts, Prompts]:
    """Prompts to learn from, and held-out prompts for the guard; rows with the same prompt are on the same side."""
    if not config.guard.every:
        return prompts, Prompts(ids=[], rows=[])
    different = sorted({tuple(prompt) for prompt in prompts.ids})
    number = config.guard.prompts
    if not context.world_size <= number < len(different):
        raise ConfigError(
            f"{number} prompts cannot be held out of {len(different)} with {context.world_size} processes",
            where=f"stages.{context.spec.stage}.guard.prompts",
            remedy=f"choose {context.world_size} to {len(different) - 1}, or set guard.every to 0",
        )
    order = torch.randperm(len(different), generator=context.generator("held out")).tolist()
    chosen = {different[index] for index in order[:number]}
    held_out: dict[tuple[int, ...], int] = {}
    learned = []
    for index, prompt in enumerate(prompts.ids):
        if tuple(prompt) in chosen:
            held_out.setdefault(tuple(prompt), index)
        else:
            learned.append(index)
    return _selected(prompts, learned), _selected(prompts, list(held_out.values()))


def _selected(prompts: Prompts, indices: list[int]) -> Prompts:
    return Prompts(ids=[prompts.ids[index] for index in indices], rows=[prompts.rows[index] for index in indices])


def refuse_base(config: PpoConfig, context: StageContext) -> None:
    """Checks the base model of the policy and, if it is separate, of the critic.

    Raises:
        ModelError: transformers has no scalar head for its architecture, it cannot be sampled from, or its head does
            more than one matrix product.
    """
    refuse_base_without_scores(config, context)
    if context.spec.inputs["init"].is_of_run:
        refuse_base_that_cannot_answer(context.spec, config.sampling, scored=True)
