"""Direct preference optimisation with TRL's trainer (Rafailov et al. 2023, eq. 7), and losses like it. The reference is
the policy at the start of the stage: with an adapter, the same base with the adapters as they were then; in full
training, a frozen copy of the model. At step 0 both must agree on every answer (``check_start``), so the sigmoid loss
starts at ln 2; otherwise the stage stops with an error. A loss without a reference has none of this."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset
from peft import TaskType
from trl import DPOConfig as TrlDpoConfig

from alignment.config.optim import tokens_of
from alignment.data.tokens.row_kinds import MARGIN
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.weight_file import copied_in_calls
from alignment.models.forward.answers import unwrapped
from alignment.stages.dpo import trainer as trainers
from alignment.stages.dpo.kind import DpoConfig, DpoLoss
from alignment.stages.shared import reference as references
from alignment.stages.shared.kind_answers import limits_of_parts, pair_rows
from alignment.stages.shared.preference_pairs import hold_out, pair_tokens, read_pairs
from alignment.stages.shared.result import StageResult, initial_model, initial_policy, save_model
from alignment.stages.shared.stage_rows import split_origins
from alignment.training.context import StageContext
from alignment.training.longest_batch import refuse_long_rows
from alignment.training.micro_batches import WITHOUT_ROUTER_LOSS
from alignment.training.optimizer import common_arguments
from alignment.training.session import train
from alignment.training.validation import Validation, of_handed_on

DIVERGED = 10
"""A loss this many times the loss at the start cannot be noise."""
ANSWERS = ("chosen", "rejected")
_REPLACED = "sigmoid"
"""What TRL computes where one of our losses takes its place."""


def run(config: DpoConfig, context: StageContext) -> StageResult:
    """Pairs and a policy in, policy out."""
    start, tokenizer = initial_policy(context)
    pairs, counts = read_pairs(config, context, tokenizer)
    learned, held_out = hold_out(config, context, pairs, pair_rows(config.margin), limits_of_parts(config), tokenizer)
    counts["rows"] = float(len(learned))
    trainer = _trainer(config, context, start, tokenizer, learned, held_out)
    first = check_start(trainer)
    for reference in (trainer.precomputed, trainer.precomputed_held_out):
        if reference is not None and context.is_main:
            reference.keep()
    ceiling, validation = DIVERGED * start_loss(config, first.start), None
    if held_out is not None:
        rows = _dataset(held_out, trainer.precomputed_held_out)
        validation = Validation(config.validation, context, trainer, rows, pair_tokens(held_out))
    last = train(trainer, context, headline="loss", ceiling=ceiling, validation=validation)
    metrics = {
        "loss": last["loss"],
        "rewards/accuracies": last["rewards/accuracies"],
        "rewards/margins": last["rewards/margins"],
        **first.changes(),
        **counts,
        **of_handed_on(last),
    }
    return save_model(trainer.model, tokenizer, context, start, metrics)


def _trainer(
    config: DpoConfig,
    context: StageContext,
    start: Lineage,
    tokenizer: Any,
    pairs: Dataset,
    held_out: Dataset | None = None,
) -> trainers.PairTrainer:
    pairs, origin_of = split_origins(pairs)
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    refuse_long_rows(policy, pairs, origin_of)  # before the reference reads them
    reference = precomputed = precomputed_held_out = None

    def computed(rows: Dataset) -> references.Reference:
        tokens = tokens_of(config.optim.micro_batch_tokens)
        return references.precomputed_reference(policy, start, rows, context, answers=ANSWERS, tokens=tokens)

    if config.precompute_reference:
        precomputed = computed(pairs)
        precomputed_held_out = None if held_out is None else computed(held_out)
    elif config.loss.needs_reference:
        reference = references.copy_of_start(policy, context)
    trainer = trainers.PairTrainer(
        model=policy,
        ref_model=reference,
        args=TrlDpoConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            **WITHOUT_ROUTER_LOSS,
            beta=config.beta,
            loss_type=config.loss.value if config.loss.needs_reference else _REPLACED,
            label_smoothing=config.label_smoothing if config.loss is DpoLoss.robust else 0.0,
            max_length=None,
            # Without a reference, this keeps TRL from loading one.
            precompute_ref_log_probs=config.precompute_reference or not config.loss.needs_reference,
            remove_unused_columns=False,  # a pair may have a margin
        ),
        train_dataset=_dataset(pairs, precomputed),
        processing_class=tokenizer,
    )
    trainer.precomputed_held_out, trainer.row_origin = precomputed_held_out, origin_of
    trainer.needs_reference = config.loss.needs_reference
    trainer.own_loss, trainer.implicit_rewards = trainers.own_loss(config), trainers.implicit_rewards(config)
    trainer.nll_weight = config.nll_weight
    trainer.precompute_ref_logps = True  # each micro-batch gets them before it is learned from (PairTrainer)
    if config.margin:
        trainer.data_collator = trainers.WithMargins(trainer.data_collator)
    references.make_ready(trainer, policy, reference, precomputed, config.optim, context)
    return trainer


def _dataset(pairs: Dataset, reference: references.Reference | None) -> Dataset:
    """The pairs and the reference's log-probabilities, with the column names that TRL's collator expects."""
    rows = pairs.rename_columns({column: f"{column}_ids" for column in pairs.column_names if column != MARGIN})
    return references.with_reference(rows, reference, {answer: f"ref_{answer}_logps" for answer in ANSWERS})


def start_loss(config: DpoConfig, start: trainers.PairLogprobs) -> float:
    """The loss of the first batch while the policy equals its reference."""
    if (own := trainers.own_loss(config)) is not None:
        loss = float(own(start).mean())
    elif config.loss in (DpoLoss.hinge, DpoLoss.apo_zero, DpoLoss.apo_down):
        loss = 1.0
    else:
        loss = 1 / (4 * config.beta**2) if config.loss is DpoLoss.ipo else math.log(2)
    return loss + config.nll_weight * float(trainers.nll_of_chosen(start).mean())


def check_start(trainer: trainers.PairTrainer) -> trainers.FirstBatch:
    """The first batch, before the first step. Raises StageError: policy and reference differ on a row, so the reference
    is not the policy that the stage starts from."""
    with copied_in_calls(unwrapped(trainer.model), trainer.args.device):
        first = trainers.FirstBatch(trainer)
        if trainer.needs_reference:
            first.refuse_other_start()
    return first
