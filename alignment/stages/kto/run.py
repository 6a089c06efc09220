"""Kahneman–Tversky optimisation with TRL's trainer (Ethayarajh et al. 2024, eq. 7). The reference is the policy at the
start of the stage. At step 0 both must agree on every answer (``check_start``); then the divergence is 0 and the loss
is half the mean weight. The loss lies between 0 and the largest weight, so it has no bound beyond which training has
diverged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import TaskType
from trl import KTOConfig as TrlKtoConfig

from alignment.algos.label_weights import LabelWeights, label_weights
from alignment.config.model import Dtype
from alignment.config.optim import tokens_of
from alignment.core.errors import DataError
from alignment.data.tokens.row_kinds import DESIRABLE, LABELLED_ANSWERS, UNDESIRABLE
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.prefix import positions_of
from alignment.models.assembly.weight_file import copied_in_calls
from alignment.models.forward.answers import unwrapped
from alignment.records.training import METRICS, MetricsLog
from alignment.stages.kto.kind import FIGURES, ONE_LABEL_REMEDY, KtoConfig, one_label
from alignment.stages.kto.trainer import (
    ANSWER,
    LABEL,
    MISMATCHED,
    OTHER_REFERENCE,
    REFERENCE,
    TokenizedKtoTrainer,
    count_labels,
    in_order,
)
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.reference import (
    copy_of_start,
    make_ready,
    precomputed_reference,
    refuse_other_reference,
    with_reference,
)
from alignment.stages.shared.result import StageResult, initial_model, initial_policy, save_model
from alignment.stages.shared.stage_rows import split_origins, token_rows
from alignment.training.context import StageContext
from alignment.training.longest_batch import refuse_long_rows
from alignment.training.micro_batches import WITHOUT_ROUTER_LOSS
from alignment.training.optimizer import common_arguments
from alignment.training.session import train


def run(config: KtoConfig, context: StageContext) -> StageResult:
    """Labelled answers and a policy in, policy out. Raises DataError: all answers have the same label."""
    start, tokenizer = initial_policy(context)
    rows, counts = token_rows(context, LABELLED_ANSWERS, config.data, limits_of_parts(config), tokenizer)
    labels = count_labels(rows)
    weights = weights_of(config, labels, where=f"stages.{context.spec.stage}.data")
    trainer = _trainer(config, context, start, tokenizer, rows, weights)
    check_start(trainer)
    if trainer.precomputed is not None and context.is_main:
        trainer.precomputed.keep()
    train(trainer, context, headline="loss")
    metrics = {
        **_newest_figures(context),
        **counts,
        "desirable_rows": float(labels[DESIRABLE]),
        "undesirable_rows": float(labels[UNDESIRABLE]),
        "desirable_weight": weights.desirable,
        "undesirable_weight": weights.undesirable,
    }
    return save_model(trainer.model, tokenizer, context, start, metrics)


def _newest_figures(context: StageContext) -> dict[str, float]:
    """The last value of each figure; a batch without answers of one label has no reward of that label."""
    rows = MetricsLog(context.content / METRICS).rows() if context.is_main else []
    return {name: float(row[name]) for row in rows for name in FIGURES if name in row}


def weights_of(config: KtoConfig, labels: Mapping[str, int], *, where: str) -> LabelWeights:
    """The weights of the labels, given the number of rows of each."""
    if why := one_label(labels):
        raise DataError(why, where=where, remedy=ONE_LABEL_REMEDY)
    return label_weights(
        labels[DESIRABLE], labels[UNDESIRABLE], desirable=config.desirable_weight, undesirable=config.undesirable_weight
    )


def _trainer(
    config: KtoConfig, context: StageContext, start: Lineage, tokenizer: Any, answers: Dataset, weights: LabelWeights
) -> TokenizedKtoTrainer:
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    mismatch = config.loss.estimates_kl
    rng = context.generator("order")
    size, limit = config.optim.batch_size, min(config.max_length, positions_of(unwrapped(policy).base_model))
    rows, origin_of = split_origins(in_order(answers, rng, batch_size=size, max_length=limit, mismatch=mismatch))
    refuse_long_rows(policy, rows, origin_of)  # before the reference reads them
    names = {ANSWER: REFERENCE, MISMATCHED: OTHER_REFERENCE} if mismatch else {ANSWER: REFERENCE}
    reference = precomputed = None
    if config.precompute_reference:
        tokens = tokens_of(config.optim.micro_batch_tokens)
        precomputed = precomputed_reference(policy, start, rows, context, answers=tuple(names), tokens=tokens)
    else:
        reference = copy_of_start(policy, context)
    with_ids = rows.rename_columns({name: f"{name}_ids" for name in rows.column_names if name != LABEL})
    trainer = TokenizedKtoTrainer(
        model=policy,
        ref_model=reference,
        args=TrlKtoConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            **WITHOUT_ROUTER_LOSS,
            beta=config.beta,
            loss_type=config.loss.value,
            desirable_weight=weights.desirable,
            undesirable_weight=weights.undesirable,
            max_length=None,
            precompute_ref_log_probs=config.precompute_reference,
        ),
        train_dataset=with_reference(with_ids, precomputed, names),
        processing_class=tokenizer,
    )
    trainer.precompute_ref_logps = True  # each batch gets them before it is learned from (with_estimates)
    trainer.row_origin = origin_of
    make_ready(trainer, policy, reference, precomputed, config.optim, context)
    return trainer


def check_start(trainer: TokenizedKtoTrainer) -> None:
    """Policy and reference must agree on every answer of the first batch before the first step. A precomputed reference
    must also have the policy's numbers in its own micro-batches. Raises StageError: they differ, so the reference is
    not the policy that the stage starts from."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()  # as in training, so that active dropout is noticed
    with copied_in_calls(unwrapped(trainer.model), trainer.args.device):
        precomputed = trainer.precomputed
        if precomputed is not None:
            refuse_other_reference(precomputed.start_rows())
        is_rounded = precomputed is not None and precomputed.own.dtype is Dtype.bfloat16
        refuse_other_reference(trainer.start_rows(batch), is_rounded=is_rounded)
