"""Direct preference optimisation with TRL's trainer (Rafailov et al. 2023, eq. 7).

The reference is the policy at the start of the stage: with an adapter, the same base with the adapters as they were
then; in full training, a frozen copy of the model. At step 0 both must agree on every answer (``check_start``), so the
sigmoid loss starts at ln 2; otherwise the stage stops with an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from alignment.config.adapter import AdapterKind
from alignment.config.model import Dtype
from alignment.core.errors import StageError
from alignment.data.tokens.row_kinds import PAIRS
from alignment.models.assembly.adapters import at_start, with_own
from alignment.models.assembly.load import DTYPES, compute_in, frozen_copy
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import use_flat_attention
from alignment.stages.dpo.config import DpoConfig, DpoLoss
from alignment.stages.dpo.reference_cache import Reference, reference_logprobs
from alignment.stages.shared.initial import initial_model, initial_policy
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.preference_pairs import pair_tokens, read_pairs
from alignment.stages.shared.result import StageResult, save_model
from alignment.stages.shared.validation_rows import hold_out
from alignment.training.context import StageContext
from alignment.training.held_out import HeldOutRows
from alignment.training.looks import Validation, of_handed_on
from alignment.training.micro_batches import MicroBatches
from alignment.training.session import train
from alignment.training.sharding import everyones, prepare, read_in_calls
from alignment.training.trainer_arguments import common_arguments, optimizer_arguments

DIVERGED = 10
"""A loss this many times the loss at the start, where policy and reference are equal, cannot be noise."""
START_TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 2e-2
"""How far policy and reference may differ on a row at step 0, relative to its log-probability divided by the root of
its number of tokens, because rounding errors of tokens are independent. ``BFLOAT16_TOLERANCE``, five times the
precision of bfloat16, applies to a reference that was computed in bfloat16 in other batches."""


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


class TokenizedDpoTrainer(MicroBatches, DPOTrainer):
    """TRL's trainer on tokenised pairs, with each optimiser batch split into micro-batches."""

    pairs = True
    accuracy_metric = "rewards/accuracies"
    precomputed: Reference | None = None
    precomputed_held_out: Reference | None = None
    start_tolerance: float = START_TOLERANCE

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it already has them (reference_cache)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def _trainer(
    config: DpoConfig,
    context: StageContext,
    start: Any,
    tokenizer: Any,
    pairs: Dataset,
    held_out: Dataset | None = None,
) -> TokenizedDpoTrainer:
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    reference = precomputed = precomputed_held_out = None
    if config.precompute_reference:
        precomputed = _precomputed(unwrapped(policy), config, context, start, pairs)
        if held_out is not None:
            precomputed_held_out = _precomputed(unwrapped(policy), config, context, start, held_out)
    elif config.adapter.kind is AdapterKind.full:
        reference = frozen_copy(policy, DTYPES[context.spec.model.dtype])
        use_flat_attention(reference)  # before its weights are sharded; its outputs are compared with the policy's
        read_in_calls(reference, context)
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
    trainer.precomputed, trainer.precomputed_held_out = precomputed, precomputed_held_out
    if precomputed is not None and context.spec.model.dtype is Dtype.bfloat16:
        trainer.start_tolerance = BFLOAT16_TOLERANCE
    trainer.micro_batch_tokens = config.optim.micro_batch_tokens
    trainer.optimizer_cls_and_kwargs = optimizer_arguments(config.optim, context)
    install_causal(unwrapped(policy))
    prepare(policy, context)
    if reference is not None:
        install_causal(reference)
        compute_in(reference, context.spec.model.dtype, context.device)  # as accelerate does for the policy
    elif isinstance(policy, PeftModel):
        _use_start_as_reference(trainer, policy)
    return trainer


def _validation(
    config: DpoConfig, context: StageContext, trainer: TokenizedDpoTrainer, pairs: Dataset | None
) -> Validation | None:
    if pairs is None:
        return None
    held_out = HeldOutRows(rows=_dataset(pairs, trainer.precomputed_held_out), tokens=pair_tokens(pairs))
    return Validation(config.validation, context, trainer, held_out)


def _use_start_as_reference(trainer: TokenizedDpoTrainer, policy: PeftModel) -> None:
    """Replaces the adapter copy that TRL makes, which ignores any other adapters."""
    policy.delete_adapter("ref")
    with_own(policy)

    def reference(**inputs: Any) -> Any:
        with at_start(policy):
            return trainer.model(**inputs)

    trainer.ref_model = reference


def _precomputed(policy: Any, config: DpoConfig, context: StageContext, start: Any, pairs: Dataset) -> Reference:
    """Switches to evaluation mode first, because adapters of earlier stages may be in training mode."""
    policy.to(context.device).eval()
    use_flat_attention(policy)
    return reference_logprobs(policy, start, pairs, context, tokens=config.optim.micro_batch_tokens)


def _dataset(pairs: Dataset, reference: Reference | None) -> Dataset:
    """The pairs and the reference's log-probabilities, with the column names that TRL's collator expects."""
    rows = pairs.rename_columns({column: f"{column}_ids" for column in pairs.column_names})
    if reference is None:
        return rows
    table = rows.with_format("arrow")[:]  # rows stay memory-mapped unless they were drawn or mixed
    for name, values in (("ref_chosen_logps", reference.chosen), ("ref_rejected_logps", reference.rejected)):
        table = table.append_column(name, pa.array(values.numpy()))
    return Dataset(table, fingerprint=reference.file.stem)  # without a fingerprint, all rows would be hashed


def start_loss(config: DpoConfig) -> float:
    """The loss while the policy equals its reference."""
    if config.loss is DpoLoss.hinge:
        return 1.0
    return 1 / (4 * config.beta**2) if config.loss is DpoLoss.ipo else math.log(2)


def check_start(trainer: TokenizedDpoTrainer) -> None:
    """Policy and reference must agree on every row of the first batch before the first step.

    The mean loss would hide an error that both answers to a prompt share, and at a small beta most of any error.

    Raises:
        StageError: they differ, so the reference is not the policy that the stage starts from.
    """
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()  # as in training, so that active dropout is noticed
    micro_batches = [micro_batch for micro_batch, _ in trainer._micro_batches(batch)]
    own = [row for micro_batch in micro_batches for row in _start_rows(trainer, micro_batch)]
    worst = max((row for rows in everyones(own) for row in rows), key=lambda row: row.excess)
    if worst.excess > trainer.start_tolerance:
        raise StageError(
            f"at step 0 policy and reference differ by {abs(worst.policy - worst.reference):.3g} nats on an answer of "
            f"{worst.tokens} tokens ({worst.policy:.6g} and {worst.reference:.6g}): the reference is not the starting "
            "policy",
            remedy=_start_remedy(trainer.precomputed),
        )


@dataclass(frozen=True, slots=True)
class _StartRow:
    """An answer's log-probabilities under policy and reference, in nats, and its number of tokens."""

    policy: float
    reference: float
    tokens: int

    @property
    def excess(self) -> float:
        """The relative difference; a log-probability counts as at least one nat per token, and NaN gives infinity."""
        size = max(abs(self.reference), float(self.tokens)) / self.tokens**0.5
        difference = abs(self.policy - self.reference)
        return math.inf if math.isnan(difference) else difference / size


@torch.no_grad()
def _start_rows(trainer: TokenizedDpoTrainer, micro_batch: dict[str, Any]) -> Iterator[_StartRow]:
    """One row for each answer of a micro-batch."""
    policy = torch.cat(trainer.compute_ref_log_probs(trainer.model, micro_batch))
    if "ref_chosen_logps" in micro_batch:
        reference = torch.cat([micro_batch["ref_chosen_logps"], micro_batch["ref_rejected_logps"]])
    else:
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, micro_batch))
    tokens = micro_batch["completion_mask"].sum(-1)
    for row in zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True):
        yield _StartRow(*row)


def _start_remedy(precomputed: Reference | None) -> str:
    report = "report this with the stage.yaml of the run; if model.dtype=float32 avoids it, it is rounding"
    if precomputed is None or not precomputed.file.is_file():
        return report
    return f"delete {precomputed.file}, which holds the reference, and run again; if the error returns, {report}"
