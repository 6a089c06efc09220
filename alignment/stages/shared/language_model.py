"""Next-token training with TRL's trainer on tokenised rows, shared by SFT and continued pretraining."""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeVar

from datasets import Dataset, disable_caching
from peft import PeftModel, TaskType
from transformers import PreTrainedModel
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from alignment.config.data import ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.optim import OptimConfig, tokens_of
from alignment.data.tokens.row_kinds import CONVERSATIONS, TEXTS, Kind, Limits
from alignment.models.assembly.load import Lineage
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.stages.base import whole_rows
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.preference_pairs import hold_out, rows_of
from alignment.stages.shared.result import StageResult, initial_model, initial_policy, save_model
from alignment.stages.shared.stage_rows import split_origins, token_rows
from alignment.training.context import StageContext
from alignment.training.micro_batches import WITHOUT_ROUTER_LOSS, MicroBatches, own_coefficient
from alignment.training.optimizer import common_arguments, optimizer_arguments
from alignment.training.session import train
from alignment.training.sharding import prepare
from alignment.training.validation import Validation, of_handed_on


class TrainerConfig(Protocol):
    """Settings of a trainer of next tokens."""

    optim: OptimConfig
    log_every: int
    save_every: int


class LanguageModelConfig(TrainerConfig, Protocol):
    """Settings of a stage that learns to predict tokens."""

    adapter: AdapterConfig
    max_length: int
    packing: bool
    validation: ValidationConfig


class MicroBatchedSftTrainer(MicroBatches, SFTTrainer):
    """TRL's trainer, with each optimiser batch split into micro-batches."""

    accuracy_metric = "mean_token_accuracy"


Trainer = TypeVar("Trainer", bound=MicroBatchedSftTrainer)


def next_token_trainer(
    trainer: type[Trainer],
    config: TrainerConfig,
    context: StageContext,
    policy: PreTrainedModel | PeftModel,
    tokenizer: Any,
    rows: Dataset,
    **arguments: Any,
) -> Trainer:
    """A ``trainer`` of the policy on rows of ``input_ids`` and ``labels``, with its optimiser. ``arguments`` are
    further ones of TRL's configuration. The caller installs a forward pass and calls ``prepare``."""
    with own_coefficient(policy):
        made = trainer(
            model=policy,
            args=TrlSftConfig(
                **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
                **WITHOUT_ROUTER_LOSS,
                # Without packing there is nothing to prepare, and TRL would write a copy of all rows.
                dataset_kwargs={"skip_prepare_dataset": not arguments.get("packing", False)},
                **arguments,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    made.micro_batch_tokens = tokens_of(config.optim.micro_batch_tokens)
    made.optimizer_cls_and_kwargs = optimizer_arguments(config.optim, context, policy)
    return made


def uniform_loss(policy: PreTrainedModel | PeftModel) -> float:
    """The loss of a model for which all tokens are equally likely, in nats."""
    return math.log(unwrapped(policy).get_input_embeddings().num_embeddings)


def learn_conversations(config: Any, context: StageContext) -> StageResult:
    """The stage ``sft``: conversations in, policy out. data/tokens/row_kinds.py renders, tokenises and masks them."""
    return _stage(config, context, CONVERSATIONS, limits_of_parts(config))


def learn_texts(config: Any, context: StageContext) -> StageResult:
    """The stage ``cpt``: texts in, policy out. Every token is learned; a long text becomes several rows."""
    return _stage(config, context, TEXTS, whole_rows(config))


def _stage(config: Any, context: StageContext, kind: Kind, limits: Limits) -> StageResult:
    start, tokenizer = initial_policy(context)
    rows, counts = token_rows(context, kind, config.data, limits, tokenizer)
    learned, held_out = hold_out(config, context, rows, kind, limits, tokenizer)
    metrics = {} if kind is TEXTS else counts  # no text is too long or cut short
    metrics["rows"] = float(len(learned))
    return learn(config, context, start, tokenizer, learned, metrics, held_out=held_out)


def learn(
    config: LanguageModelConfig,
    context: StageContext,
    start: Lineage,
    tokenizer: Any,
    rows: Dataset,
    metrics: dict[str, float],
    *,
    held_out: Dataset | None = None,
) -> StageResult:
    """Trains on rows of ``input_ids``, ``labels`` and ``where`` and saves the model; ``metrics`` are added to the last
    loss. With ``held_out`` rows the model is validated while it trains."""
    if config.packing:  # TRL packs with a map, which would cache its result next to the token rows
        disable_caching()
    rows, origin_of = split_origins(rows)
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=True)
    trainer = next_token_trainer(
        MicroBatchedSftTrainer,
        config,
        context,
        policy,
        tokenizer,
        rows,
        max_length=config.max_length,
        packing=config.packing,
    )
    if not config.packing:  # a packed row has several origins
        trainer.row_origin = origin_of
    install_causal(unwrapped(policy))
    prepare(policy, context)
    ceiling = uniform_loss(policy)
    validation = None
    if held_out is not None:
        tokens = [len(ids) for (ids,) in rows_of(held_out, "input_ids")]
        validation = Validation(config.validation, context, trainer, held_out, tokens)
    last = train(trainer, context, headline="loss", ceiling=ceiling, validation=validation)
    return save_model(trainer.model, tokenizer, context, start, {"loss": last["loss"], **metrics, **of_handed_on(last)})
