"""The policy at the start of a stage as the reference of a TRL trainer that compares the two.

With an adapter, the reference is the same base with the adapters as they were at the start; in full training, it is a
frozen copy of the model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterKind
from alignment.config.micro_batch import tokens_of
from alignment.config.optim import OptimConfig
from alignment.models.assembly.adapters import at_start, with_own
from alignment.models.assembly.load import DTYPES, Lineage, compute_in, frozen_copy
from alignment.models.assembly.mapped import copy_weights
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import IGNORED, install_causal
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.transfer import on_device, on_host
from alignment.stages.shared.reference_cache import Reference, reference_logprobs
from alignment.training.context import StageContext
from alignment.training.cutting import cut_frozen
from alignment.training.micro_batches import Batch, MicroBatches
from alignment.training.sharding import prepare, read_in_calls
from alignment.training.trainer_arguments import optimizer_arguments

_HASH = "hash_module"


class AgainstStart(MicroBatches):
    """A mix-in for TRL's trainers that compare the policy with ``ref_model``, on rows that are tokenised already.

    ``precomputed`` holds the reference's log-probabilities of the rows if they were computed beforehand. A loss that
    compares nothing does not need a reference; set ``needs_reference`` before ``make_ready``.
    """

    needs_reference: bool = True
    precomputed: Reference | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # PEFT warns that loading may confuse TRL's copy, ref, with a prefix; the copy is dropped (make_ready).
            warnings.filterwarnings("ignore", message="Adapter name 'ref' should not be contained in the prefix")
            with _without_hash(type(self)):
                super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it already has them (reference_cache), or needs none

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's loss, with labels that are equal to TRL's, and known on the host."""

        def forward(**arguments: Any) -> Any:
            if arguments["input_ids"] is inputs["input_ids"]:
                arguments["labels"] = _labels_of(inputs)
            return model(**arguments)

        loss: Tensor = super()._compute_loss(forward, inputs, *args, **kwargs)
        return loss


@contextmanager
def _without_hash(trainer: type) -> Iterator[None]:
    """TRL's trainers without the hash of all weights, which names a cache of TRL that is not used here.

    For eight billion weights it takes a minute, also where no loss needs a reference.
    """
    modules = {sys.modules[base.__module__] for base in trainer.__mro__}
    functions = {module: getattr(module, _HASH) for module in modules if hasattr(module, _HASH)}
    for module in functions:
        setattr(module, _HASH, lambda *_: "")
    try:
        yield
    finally:
        for module, function in functions.items():
            setattr(module, _HASH, function)


def copy_of_start(policy: PreTrainedModel | PeftModel, context: StageContext) -> PreTrainedModel | None:
    """A frozen copy in full training; None with an adapter, whose base serves both. Pass it to the trainer."""
    if context.adapter.kind is not AdapterKind.full:
        return None
    reference = frozen_copy(policy, DTYPES[context.spec.model.dtype])
    use_flat_attention(reference)  # before its weights are sharded; its outputs are compared with the policy's
    read_in_calls(reference, context)
    cut_frozen(reference, context)
    return reference


def make_ready(
    trainer: AgainstStart,
    policy: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | None,
    precomputed: Reference | None,
    optim: OptimConfig,
    context: StageContext,
) -> None:
    """Gives a newly made trainer its optimiser, the fast forward and its reference."""
    trainer.precomputed = precomputed
    trainer.micro_batch_tokens = tokens_of(optim.micro_batch_tokens)
    trainer.optimizer_cls_and_kwargs = optimizer_arguments(optim, context, policy)
    install_causal(unwrapped(policy))
    prepare(policy, context)
    if reference is not None:
        install_causal(reference)
        compute_in(reference, context.spec.model.dtype, context.device)  # as accelerate does for the policy
    elif isinstance(policy, PeftModel):
        _drop_copied_adapter(policy)
        if trainer.needs_reference:
            _use_start_as_reference(trainer, policy)


def _drop_copied_adapter(policy: PeftModel) -> None:
    """Removes the copy that TRL makes for a reference, which ignores any other adapters."""
    policy.delete_adapter("ref")
    with_own(policy)


def _use_start_as_reference(trainer: AgainstStart, policy: PeftModel) -> None:
    def reference(**inputs: Any) -> Any:
        with at_start(policy):
            return trainer.model(**inputs)

    trainer.ref_model = reference


def answer_logprobs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """``[rows]`` log-probabilities of the answers in a padded batch, in nats."""
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs: Tensor = model(**texts, labels=_labels_of(batch), use_cache=False, fused_lm_head=True).log_probs
    return logprobs.sum(-1)


def _labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """``[rows, columns]``: the tokens of the answers, made on the host, so that their places are known there."""
    ids, is_answer = on_host(batch["input_ids"], batch["completion_mask"])
    return on_device(ids.masked_fill(is_answer == 0, IGNORED), batch["input_ids"].device)


def precomputed_reference(
    policy: PreTrainedModel | PeftModel,
    start: Lineage,
    rows: Dataset,
    context: StageContext,
    *,
    answers: Sequence[str],
    tokens: int,
) -> Reference:
    """As ``reference_logprobs``.

    Switches the policy to evaluation mode first, because adapters of earlier stages may be in training mode. Its
    weights are whole from then on until the trainer cuts them.
    """
    model = unwrapped(policy)
    copy_weights(model.parameters())
    model.to(context.device).eval()
    use_flat_attention(model)
    return reference_logprobs(model, start, rows, context, answers=answers, tokens=tokens)


def with_reference(rows: Dataset, reference: Reference | None, names: Mapping[str, str]) -> Dataset:
    """The rows with the reference's log-probabilities; ``names`` maps its columns to those that TRL expects."""
    if reference is None:
        return rows
    columns: Mapping[str, Tensor] = reference.logprobs
    table = rows.with_format("arrow")[:]  # rows stay memory-mapped unless they were drawn or mixed
    for column, name in names.items():
        table = table.append_column(name, pa.array(columns[column].numpy()))
    return Dataset(table, fingerprint=reference.file.stem)  # without a fingerprint, all rows would be hashed
