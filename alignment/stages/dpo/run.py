"""Direct preference optimisation with TRL's trainer (Rafailov et al. 2023, eq. 7).

The reference is the policy at the start of the stage: with an adapter, the same base with the adapters as they were
then; in full training, a frozen copy of the model. At step 0 both must agree on every answer (``check_start``), so the
sigmoid loss starts at ln 2; otherwise the stage stops with an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from alignment.data.tokens.row_kinds import PAIRS
from alignment.models.assembly.load import Lineage
from alignment.stages.dpo.config import DpoConfig, DpoLoss
from alignment.stages.shared.initial import initial_model, initial_policy
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.preference_pairs import pair_tokens, read_pairs
from alignment.stages.shared.reference_cache import Reference
from alignment.stages.shared.result import StageResult, save_model
from alignment.stages.shared.start_check import StartRow, refuse_other_reference
from alignment.stages.shared.start_reference import (
    AgainstStart,
    copy_of_start,
    make_ready,
    precomputed_reference,
    with_reference,
)
from alignment.stages.shared.validation_rows import hold_out
from alignment.training.context import StageContext
from alignment.training.held_out import HeldOutRows
from alignment.training.looks import Validation, of_handed_on
from alignment.training.micro_batches import Unit
from alignment.training.session import train
from alignment.training.trainer_arguments import common_arguments

DIVERGED = 10
"""A loss this many times the loss at the start, where policy and reference are equal, cannot be noise."""
ANSWERS = ("chosen", "rejected")


def run(config: DpoConfig, context: StageContext) -> StageResult:
    """Pairs and a policy in, policy out."""
    start, tokenizer = initial_policy(context)
    pairs, counts = read_pairs(config, context, tokenizer, located=config.validation.takes_rows)
    learned, held_out = hold_out(config, context, pairs, PAIRS, limits_of_parts(config), tokenizer)
    counts["rows"] = float(len(learned))
    trainer = _trainer(config, context, start, tokenizer, learned, held_out)
    check_start(trainer)
    for reference in (trainer.precomputed, trainer.precomputed_held_out):
        if reference is not None and context.is_main:
            reference.keep()
    last = train(
        trainer,
        context,
        headline="loss",
        ceiling=DIVERGED * start_loss(config),
        validation=_validation(config, context, trainer, held_out),
    )
    metrics = {
        "loss": last["loss"],
        "rewards/accuracies": last["rewards/accuracies"],
        "rewards/margins": last["rewards/margins"],
        **counts,
        **of_handed_on(last),
    }
    return save_model(trainer.model, tokenizer, context, start, metrics)


class TokenizedDpoTrainer(AgainstStart, DPOTrainer):
    """TRL's trainer on tokenised pairs, with each optimiser batch split into micro-batches."""

    unit = Unit.pairs
    accuracy_metric = "rewards/accuracies"
    precomputed_held_out: Reference | None = None


def _trainer(
    config: DpoConfig,
    context: StageContext,
    start: Lineage,
    tokenizer: Any,
    pairs: Dataset,
    held_out: Dataset | None = None,
) -> TokenizedDpoTrainer:
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    reference = precomputed = precomputed_held_out = None

    def computed(rows: Dataset) -> Reference:
        tokens = config.optim.micro_batch_tokens
        return precomputed_reference(policy, start, rows, context, answers=ANSWERS, tokens=tokens)

    if config.precompute_reference:
        precomputed = computed(pairs)
        precomputed_held_out = None if held_out is None else computed(held_out)
    else:
        reference = copy_of_start(policy, context)
    trainer = TokenizedDpoTrainer(
        model=policy,
        ref_model=reference,
        args=TrlDpoConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            beta=config.beta,
            loss_type=config.loss.value,
            max_length=None,
            precompute_ref_log_probs=config.precompute_reference,
        ),
        train_dataset=_dataset(pairs, precomputed),
        processing_class=tokenizer,
    )
    trainer.precomputed_held_out = precomputed_held_out
    make_ready(trainer, policy, reference, precomputed, config.optim, context)
    return trainer


def _validation(
    config: DpoConfig, context: StageContext, trainer: TokenizedDpoTrainer, pairs: Dataset | None
) -> Validation | None:
    if pairs is None:
        return None
    held_out = HeldOutRows(rows=_dataset(pairs, trainer.precomputed_held_out), tokens=pair_tokens(pairs))
    return Validation(config.validation, context, trainer, held_out)


def _dataset(pairs: Dataset, reference: Reference | None) -> Dataset:
    """The pairs and the reference's log-probabilities, with the column names that TRL's collator expects."""
    rows = pairs.rename_columns({column: f"{column}_ids" for column in pairs.column_names})
    return with_reference(rows, reference, {answer: f"ref_{answer}_logps" for answer in ANSWERS})


def start_loss(config: DpoConfig) -> float:
    """The loss while the policy equals its reference."""
    if config.loss is DpoLoss.hinge:
        return 1.0
    return 1 / (4 * config.beta**2) if config.loss is DpoLoss.ipo else math.log(2)


def check_start(trainer: TokenizedDpoTrainer) -> None:
    """Policy and reference must agree on every answer of the first batch before the first step.

    Raises:
        StageError: they differ, so the reference is not the policy that the stage starts from.
    """
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()  # as in training, so that active dropout is noticed
    micro_batches = [micro_batch for micro_batch, _ in trainer._micro_batches(batch)]
    own = [row for micro_batch in micro_batches for row in _start_rows(trainer, micro_batch)]
    refuse_other_reference(own, trainer.precomputed, tolerance=trainer.start_tolerance)


@torch.no_grad()
def _start_rows(trainer: TokenizedDpoTrainer, micro_batch: dict[str, Any]) -> Iterator[StartRow]:
    """One row for each answer of a micro-batch."""
    policy = torch.cat(trainer.compute_ref_log_probs(trainer.model, micro_batch))
    if "ref_chosen_logps" in micro_batch:
        reference = torch.cat([micro_batch["ref_chosen_logps"], micro_batch["ref_rejected_logps"]])
    else:
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, micro_batch))
    tokens = micro_batch["completion_mask"].sum(-1)
    for row in zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True):
        yield StartRow(*row)
