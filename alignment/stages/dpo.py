"""Direct preference optimisation on TRL's trainer (Rafailov et al. 2023, eq. 7).

The reference is the policy at the start of the stage: under an adapter it is the same base with the adapters as they
were then; in full training it is a frozen copy of the model. At step 0 both agree, so the loss must be ln 2; a stage
where it is not stops with a reason.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from alignment.config.adapter import AdapterKind
from alignment.config.stage import DpoConfig, DpoLoss
from alignment.errors import StageError
from alignment.models.adapters import at_start, with_own
from alignment.models.answers import unwrapped
from alignment.models.flat import use_flat_attention
from alignment.models.forward import install_causal
from alignment.models.load import DTYPES, compute_in, frozen_copy
from alignment.stages.initial import initial_model, initial_policy
from alignment.stages.pairs import read_pairs
from alignment.stages.reference_cache import reference_logprobs
from alignment.stages.result import StageResult, save_model
from alignment.training.adamw import adamw
from alignment.training.arguments import common_arguments
from alignment.training.context import StageContext
from alignment.training.micro_batches import MicroBatches
from alignment.training.session import train
from alignment.training.sharding import prepare, read_in_calls

START_TOLERANCE = 1e-3
PRECOMPUTED_TOLERANCE = 2e-2
"""Room for bfloat16 in the step-0 check, more where the reference was computed in other batches; a wrong reference is
off by far more."""


def run(config: DpoConfig, context: StageContext) -> StageResult:
    """Pairs and a policy in, policy out."""
    found, tokenizer = initial_policy(context)
    pairs, counts = read_pairs(config, context, tokenizer)
    trainer = _trainer(config, context, found, tokenizer, pairs)
    check_start(trainer, config)
    last = train(trainer, context, headline="loss")
    metrics = {
        "loss": last["loss"],
        "rewards/accuracies": last["rewards/accuracies"],
        "rewards/margins": last["rewards/margins"],
        **counts,
    }
    return save_model(trainer.model, tokenizer, context, found, metrics)


class TokenizedDpoTrainer(MicroBatches, DPOTrainer):
    """TRL's trainer on pairs that are tokens already, an optimiser batch learned from in pieces."""

    pairs = True

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it has them already (reference_cache)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def _trainer(config: DpoConfig, context: StageContext, found: Any, tokenizer: Any, pairs: Any) -> TokenizedDpoTrainer:
    policy = initial_model(context, found, TaskType.CAUSAL_LM)
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    reference = None
    if config.precompute_reference:
        _add_reference(rows, unwrapped(policy), config, context, found, pairs)
    elif config.adapter.kind is AdapterKind.full:
        reference = frozen_copy(policy, DTYPES[context.spec.model.dtype])
        use_flat_attention(reference)  # while its weights are whole: what it says is compared with the policy's
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
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.micro_batch_tokens = config.optim.micro_batch_tokens
    trainer.optimizer_cls_and_kwargs = adamw(config.adapter, config.optim, context)
    install_causal(unwrapped(policy))
    prepare(policy, context)
    if reference is not None:
        install_causal(reference)
        compute_in(reference, context.spec.model.dtype, context.device)  # as accelerate does for the policy
    elif isinstance(policy, PeftModel):
        _refer_to_the_start(trainer, policy)
    return trainer


def _refer_to_the_start(trainer: TokenizedDpoTrainer, policy: PeftModel) -> None:
    """Instead of the copy of the adapter that TRL makes: it knows nothing of other adapters beside that one."""
    policy.delete_adapter("ref")
    with_own(policy)

    def reference(**inputs: Any) -> Any:
        with at_start(policy):
            return trainer.model(**inputs)

    trainer.ref_model = reference


def _add_reference(
    rows: list[dict[str, Any]], policy: Any, config: DpoConfig, context: StageContext, found: Any, pairs: Any
) -> None:
    """Puts the reference's log-probabilities into the rows, under the names that TRL's collator looks for."""
    policy.to(context.device)
    use_flat_attention(policy)
    sums = reference_logprobs(policy, found, pairs, context, tokens=config.optim.micro_batch_tokens)
    for row, chosen, rejected in zip(rows, *sums, strict=True):
        row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def start_loss(config: DpoConfig) -> float:
    """The loss of a policy that is its reference."""
    if config.loss is DpoLoss.hinge:
        return 1.0
    return 1 / (4 * config.beta**2) if config.loss is DpoLoss.ipo else math.log(2)


def check_start(trainer: TokenizedDpoTrainer, config: DpoConfig) -> None:
    """Policy and reference must agree before the first step: the loss is then a known constant.

    Raises:
        StageError: they differ, so the reference is not the policy that the stage starts from.
    """
    expected = start_loss(config)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    piece, _ = trainer._parts(batch)[0]
    with torch.no_grad(), trainer.accelerator.autocast():
        loss = float(trainer.compute_loss(trainer.model, piece))
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    tolerance = PRECOMPUTED_TOLERANCE if config.precompute_reference else START_TOLERANCE
    if abs(loss - expected) > tolerance * max(1.0, expected):
        raise StageError(
            f"at step 0 the DPO loss is {loss:.6f}, not {expected:.6f} (within {tolerance:g}): the reference is not "
            "the starting policy",
            remedy="report this with the stage.yaml of the run; with model.dtype=float32 a rounding would show as such",
        )
