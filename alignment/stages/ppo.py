"""Proximal policy optimisation against a reward model, on our own trainer (docs/design/0002)."""

from __future__ import annotations

from transformers import TrainingArguments

from alignment.algos.kl import AdaptiveKl, FixedKl
from alignment.config.stage import KlConfig, KlControl, PpoConfig
from alignment.data.fit import rows_that_fit
from alignment.data.records import Prompt
from alignment.data.sources import read_jsonl
from alignment.data.tokenize import prompt_ids, tokenize_rows
from alignment.errors import ConfigError
from alignment.models.load import lineage, load_tokenizer, refuse_other_tokenizer
from alignment.models.roles import Roles, build_roles
from alignment.stages.result import StageResult, save_model
from alignment.training.arguments import SCHEDULES, quiet_arguments
from alignment.training.context import StageContext
from alignment.training.ppo_trainer import Episodes, PpoTrainer
from alignment.training.session import train


def run(config: PpoConfig, context: StageContext) -> StageResult:
    """A policy, a reward model and prompts in, policy out."""
    spec = context.spec
    context.progress("loading")
    found = lineage(spec, spec.inputs["init"])
    tokenizer = load_tokenizer(found.base)
    refuse_other_tokenizer(spec, spec.inputs["reward"], tokenizer)
    records = read_jsonl(spec.data_path, Prompt, limit=config.data.limit)
    rows = tokenize_rows(spec.data_path, records, lambda record: prompt_ids(tokenizer, record.messages))
    prompts, dropped = rows_that_fit(
        rows, len, max_length=config.max_prompt_length, where=f"stages.{spec.stage}.max_prompt_length"
    )
    roles = build_roles(
        spec,
        found,
        spec.inputs["reward"],
        config.adapter,
        device=context.device,
        critic=config.critic,
        relative_returns=config.prompt_baseline,
    )
    trainer = _trainer(config, context, roles, prompts, tokenizer.eos_token_id)
    last = train(trainer, context, headline="objective/score", period=trainer.steps_per_update)
    kept = ("objective/score", "objective/kl", "response_length", "eos_rate")
    metrics = {name: last[name] for name in kept} | {"rows": float(len(prompts)), "rows_too_long": float(dropped)}
    return save_model(roles.policy, tokenizer, context, found, metrics)


def kl_price(config: KlConfig) -> FixedKl | AdaptiveKl:
    """The controller that the configuration names."""
    if config.control is KlControl.adaptive:
        return AdaptiveKl(coefficient=config.coefficient, target=config.target, horizon=config.horizon)
    return FixedKl(coefficient=config.coefficient)


def _trainer(
    config: PpoConfig, context: StageContext, roles: Roles, prompts: list[list[int]], end_id: int
) -> PpoTrainer:
    _refuse_uneven_groups(config, context)
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
        end_id=end_id,
        per_update=config.optim.batch_size,
        group=config.completions_per_prompt,
        micro_batch_tokens=config.optim.micro_batch_tokens,
    )
    return PpoTrainer(roles, config, context, episodes=episodes, price=kl_price(config.kl), args=arguments)


def _refuse_uneven_groups(config: PpoConfig, context: StageContext) -> None:
    """All answers to a prompt are sampled and learned from on one process.

    Raises:
        ConfigError: the episodes do not divide by them, or the prompts not by the processes and minibatches.
    """
    where = f"stages.{context.spec.stage}"
    prompts, rest = divmod(config.optim.batch_size, config.completions_per_prompt)
    if rest:
        raise ConfigError(
            f"{config.optim.batch_size} episodes do not divide by {config.completions_per_prompt} completions a prompt",
            where=f"{where}.completions_per_prompt",
            remedy="choose a divisor of optim.batch_size",
        )
    if config.prompt_baseline and config.completions_per_prompt == 1:
        raise ConfigError(
            "the baseline is the mean over the other completions of a prompt, and there are none",
            where=f"{where}.prompt_baseline",
            remedy="set completions_per_prompt to 2 or more",
        )
    if prompts % context.world_size:
        raise ConfigError(
            f"{prompts} prompts an update do not divide by {context.world_size} processes",
            where=f"{where}.optim.batch_size",
            remedy=f"choose a multiple of {context.world_size * config.completions_per_prompt}",
        )
    if prompts // config.num_minibatches < context.world_size:
        raise ConfigError(
            f"{config.num_minibatches} minibatches of {prompts} prompts leave {prompts // config.num_minibatches} for "
            f"{context.world_size} processes",
            where=f"{where}.num_minibatches",
            remedy="choose a larger optim.batch_size, or fewer minibatches",
        )
