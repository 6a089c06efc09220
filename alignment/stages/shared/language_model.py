"""Next-token training with TRL's trainer on tokenised rows, shared by SFT and continued pretraining."""

from __future__ import annotations

import math
from typing import Any, Protocol

from datasets import Dataset, disable_caching
from peft import TaskType
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from alignment.config.adapter import AdapterConfig
from alignment.config.optim import OptimConfig
from alignment.config.validation import ValidationConfig
from alignment.models.assembly.load import Lineage
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.stages.shared.initial import initial_model
from alignment.stages.shared.preference_pairs import rows_of
from alignment.stages.shared.result import StageResult, save_model
from alignment.training.context import StageContext
from alignment.training.held_out import HeldOutRows
from alignment.training.looks import Validation, of_handed_on
from alignment.training.micro_batches import MicroBatches
from alignment.training.session import train
from alignment.training.sharding import prepare
from alignment.training.trainer_arguments import common_arguments, optimizer_arguments


class LanguageModelConfig(Protocol):
    """Settings of a stage that learns to predict tokens."""

    adapter: AdapterConfig
    optim: OptimConfig
    max_length: int
    packing: bool
    validation: ValidationConfig
    log_every: int
    save_every: int


class MicroBatchedSftTrainer(MicroBatches, SFTTrainer):
    """TRL's trainer, with each optimiser batch split into micro-batches."""

    accuracy_metric = "mean_token_accuracy"


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
    """Trains on rows of ``input_ids`` and ``labels`` and saves the model; ``metrics`` are added to the last loss.

    With ``held_out`` rows the model is validated while it trains.
    """
    if config.packing:  # TRL packs with a map, which would cache its result next to the token rows
        disable_caching()
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=True)
    trainer = MicroBatchedSftTrainer(
        model=policy,
        args=TrlSftConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            max_length=config.max_length,
            packing=config.packing,
            # Without packing there is nothing to prepare, and TRL would write a copy of all rows.
            dataset_kwargs={"skip_prepare_dataset": not config.packing},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.micro_batch_tokens = config.optim.micro_batch_tokens
    trainer.optimizer_cls_and_kwargs = optimizer_arguments(config.optim, context)
    install_causal(unwrapped(policy))
    prepare(policy, context)
    uniform = math.log(unwrapped(policy).get_input_embeddings().num_embeddings)
    validation = None
    if held_out is not None:
        validation = Validation(config.validation, context, trainer, _with_lengths(held_out))
    last = train(trainer, context, headline="loss", ceiling=uniform, validation=validation)
    return save_model(trainer.model, tokenizer, context, start, {"loss": last["loss"], **metrics, **of_handed_on(last)})


def _with_lengths(rows: Dataset) -> HeldOutRows:
    return HeldOutRows(rows=rows, tokens=[len(ids) for (ids,) in rows_of(rows, "input_ids")])
