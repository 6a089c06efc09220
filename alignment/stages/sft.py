"""Supervised fine-tuning on TRL's trainer, on rows that we tokenised and masked (alignment/data/tokenize.py)."""

from __future__ import annotations

from datasets import Dataset
from peft import TaskType
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from alignment.config.stage import SftConfig
from alignment.data.fit import rows_that_fit
from alignment.data.records import Conversation
from alignment.data.sources import read_jsonl
from alignment.data.tokenize import tokenize_conversation, tokenize_rows
from alignment.models.adapters import add_adapter
from alignment.models.forward import install_causal
from alignment.models.load import lineage, load_policy, load_tokenizer, weights_dtype
from alignment.stages.result import StageResult, save_model
from alignment.training.adamw import adamw
from alignment.training.arguments import common_arguments
from alignment.training.context import StageContext
from alignment.training.micro_batches import MicroBatches
from alignment.training.session import train


def run(config: SftConfig, context: StageContext) -> StageResult:
    """Conversations in, policy out."""
    spec = context.spec
    context.progress("loading")
    found = lineage(spec, spec.inputs["init"])
    tokenizer = load_tokenizer(found.base)
    dataset, dropped = _dataset(config, context, tokenizer)
    policy = load_policy(found, weights_dtype(spec.model.dtype, config.adapter))
    trainer = PiecewiseSftTrainer(
        model=add_adapter(policy, config.adapter, TaskType.CAUSAL_LM),
        args=TrlSftConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            max_length=config.max_length,
            packing=config.packing,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.micro_batch_tokens = config.optim.micro_batch_tokens
    trainer.optimizer_cls_and_kwargs = adamw(config.adapter, config.optim, context)
    install_causal(policy)
    last = train(trainer, context, headline="loss")
    metrics = {"loss": last["loss"], "rows": float(len(dataset)), "rows_too_long": float(dropped)}
    return save_model(trainer.model, tokenizer, context, found, metrics)


class PiecewiseSftTrainer(MicroBatches, SFTTrainer):
    """TRL's trainer, an optimiser batch learned from in pieces."""


def _dataset(config: SftConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, int]:
    records = read_jsonl(context.spec.data_path, Conversation, limit=config.data.limit)
    rows = tokenize_rows(
        context.spec.data_path, records, lambda record: tokenize_conversation(tokenizer, record.messages)
    )
    kept, dropped = rows_that_fit(
        rows, lambda row: len(row.input_ids), max_length=config.max_length, where=f"stages.{context.spec.stage}"
    )
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in kept]), dropped
