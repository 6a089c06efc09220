"""The reference of a preference stage: computed beside the policy or stored, and equal to it at the start."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.model import AdapterConfig, AdapterKind, Chain, Dtype
from alignment.config.optim import OptimConfig, tokens_of
from alignment.core.errors import StageError
from alignment.core.files import remove_leftovers, replacing
from alignment.core.hardware import has_amx
from alignment.costs.recorder import on_shadows, some_of
from alignment.models.assembly.adapters import at_start, with_own
from alignment.models.assembly.load import DTYPES, Lineage, compute_in, frozen_copy, products_in, weights_sha256
from alignment.models.assembly.weight_file import copy_weights, write_weights
from alignment.models.forward.answers import answer_statistics, answer_stream, micro_batches_of, unwrapped
from alignment.models.forward.causal import IGNORED, install_causal
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.rows import on_device, on_host
from alignment.stages.shared.preference_pairs import rows_of
from alignment.training.context import StageContext
from alignment.training.micro_batches import Batch, MicroBatches
from alignment.training.optimizer import optimizer_arguments
from alignment.training.sharding import cut_frozen, everyones, prepare, read_in_calls

START_TOLERANCE = 1e-3
"""How far policy and reference may differ on a row at step 0, relative to its log-probability divided by the root of
its number of tokens, because rounding errors of tokens are independent. Both are computed in the same micro-batch: in
bfloat16, the other rows of a micro-batch change the log-probability of an answer by some tenths of a nat."""
ROUNDED_TOLERANCE = 0.2
"""The same for a reference in bfloat16 from other micro-batches, and for the median of the rows: rounding gives some
hundredths, and a reference of other rows a number above 1."""


@dataclass(frozen=True, slots=True)
class StartRow:
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


def refuse_other_reference(own: Iterable[StartRow], *, is_rounded: bool = False) -> None:
    """Compares the answers of this process and of all others; every process must call this. ``is_rounded``: the
    reference was computed in bfloat16 in other micro-batches. Raises StageError: policy and reference differ on an
    answer, so the stage does not start from the reference."""
    rows = sorted((row for rows in everyones(list(own)) for row in rows), key=lambda row: row.excess)
    worst = rows[len(rows) // 2] if is_rounded else rows[-1]
    if worst.excess > (ROUNDED_TOLERANCE if is_rounded else START_TOLERANCE) and not on_shadows():
        raise StageError(
            f"at step 0 policy and reference differ by {abs(worst.policy - worst.reference):.3g} nats on an answer of "
            f"{worst.tokens} tokens ({worst.policy:.6g} and {worst.reference:.6g}): the reference is not the starting "
            "policy",
            remedy="nothing was trained; report this with the stage.yaml of the run",
        )


log = logging.getLogger(__name__)

VERSION = 7
"""Raised when the computation changes, so that older files are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Log-probabilities of answers, ``[rows]`` in nats, by the column of the answers; and the file that caches them.
    The file may not exist yet. ``is_final``: it may be written. ``own`` computes this process's share of the rows."""

    logprobs: Mapping[str, Tensor]
    file: Path
    own: OwnRows
    is_final: bool = True

    def start_rows(self) -> list[StartRow]:
        """Answers of this process beside their reference, computed with the policy as it is now. They are those of the
        first micro-batch of each column, as in bfloat16 other micro-batches give other values."""
        return [
            StartRow(now, before, len(ids))
            for answer, every in self.logprobs.items()
            for now, before, ids in zip(
                self.own.sums(answer, micro_batches=1).tolist(),
                every[self.own.rank :: self.own.world_size].tolist(),
                self.own.rows[answer],
                strict=False,
            )
        ]

    def keep(self) -> None:
        """Writes the file if it may be written, unless it has these numbers. One process calls this, after the sums
        were checked."""
        rows = {len(column) for column in self.logprobs.values()}
        known = _read(self.file, tuple(self.logprobs), rows=rows.pop()) if self.is_final else self.logprobs
        if known is None or any(not torch.equal(known[name], own) for name, own in self.logprobs.items()):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.file.parent, shared=True)
            with replacing(self.file) as temporary:  # no machine that shares the folder sees an incomplete file
                write_weights(dict(self.logprobs), temporary)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnRows:
    """Every n-th row, of n processes, and what computes them; ``tokens`` limits the tokens of a micro-batch."""

    policy: PreTrainedModel
    rows: Dataset
    dtype: Dtype
    tokens: int
    rank: int
    world_size: int

    @torch.no_grad()
    def sums(self, answer: str, *, micro_batches: int | None = None) -> Tensor:
        """``[rows]`` log-probabilities of the answers in the column ``answer``; of the first ``micro_batches`` only."""

        def size(micro_batch: range) -> int:
            texts = self.rows[micro_batch.start : micro_batch.stop]
            return sum(map(len, [*texts["prompt"], *texts[answer]]))

        sums: list[Tensor] = []
        ranges = micro_batches_of(rows_of(self.rows, "prompt", answer), tokens=self.tokens)[:micro_batches]
        with products_in(self.dtype, self.policy.device):
            for micro_batch in some_of(ranges, size):
                texts = self.rows[micro_batch.start : micro_batch.stop]
                part = answer_stream(texts["prompt"], texts[answer], self.policy.device)
                logprobs = answer_statistics(self.policy, part).logprobs
                sums += [row.sum() for row in logprobs.split(list(part.lengths))]
        if on_shadows():  # where no number means anything, and not all rows were read
            return torch.ones(len(self.rows))
        return torch.stack(sums).cpu() if sums else torch.empty(0)


def precomputed_reference(
    policy: PreTrainedModel | PeftModel,
    start: Lineage,
    rows: Dataset,
    context: StageContext,
    *,
    answers: Sequence[str],
    tokens: int,
) -> Reference:
    """The reference of all rows, from the cache, or computed, with each process computing its share. ``answers`` are
    the columns of the answers to the column ``prompt``. ``tokens`` limits the tokens of a micro-batch. Switches the
    policy to evaluation mode first, because adapters of earlier stages may be in training mode. Its weights are whole
    from then on until the trainer cuts them."""
    model = unwrapped(policy)
    copy_weights(model.parameters())
    model.to(context.device).eval()
    use_flat_attention(model)
    own = OwnRows(
        policy=model,
        rows=rows.shard(num_shards=context.world_size, index=context.rank, contiguous=False),
        dtype=context.spec.model.dtype,
        tokens=tokens,
        rank=context.rank,
        world_size=context.world_size,
    )
    shaped_by = [own.dtype.value, str(model.dtype), _device_name(context.device), tokens, context.world_size]
    key = _key(start, rows_of(rows, "prompt", *answers), context.adapter, shaped_by)
    file = context.spec.artifact.parent / "cache" / f"reference-{key}.safetensors"
    columns = _read(file, answers, rows=len(rows))
    if all(everyones(columns is not None)) and columns is not None:
        cached = Reference(logprobs=columns, file=file, own=own)
        if all(everyones(on_shadows() or all(row.excess <= START_TOLERANCE for row in cached.start_rows()))):
            return cached
        log.warning("the policy does not have the log-probabilities in %s, so they are computed again.", file)
    context.progress("reference log-probabilities")
    shares = everyones([own.sums(answer) for answer in answers])
    sums = [torch.empty(len(rows)) for _ in answers]
    for rank, of_process in enumerate(shares):  # each of n processes computed every n-th row
        for column, share in zip(sums, of_process, strict=True):
            column[rank :: len(shares)] = share
    # During a search for the size of micro-batches, they are those of another size.
    is_final = context.search is None and not on_shadows()
    return Reference(logprobs=dict(zip(answers, sums, strict=True)), file=file, own=own, is_final=is_final)


def _key(
    start: Lineage, rows: Iterable[tuple[list[int], ...]], adapter: AdapterConfig, shaped_by: Sequence[object]
) -> str:
    """The cache key. ``shaped_by``: formats (with master weights, that of weights differs from that of products),
    device and micro-batches."""
    nf4 = adapter.kind is AdapterKind.qlora
    keeps_adapters = adapter.kind is not AdapterKind.full and adapter.chain is not Chain.merge
    stacked = keeps_adapters and bool(start.adapters)
    content = "" if on_shadows() else weights_sha256(start)  # an estimate reads no weights
    prefix = adapter.virtual_tokens if adapter.kind is AdapterKind.prefix else 0  # a new one takes a share of attention
    sha = hashlib.sha256(json.dumps([VERSION, torch.__version__, *shaped_by, content, nf4, stacked, prefix]).encode())
    for row in rows:
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def _device_name(device: torch.device) -> str:
    """GPU models round differently from one another, and so do processors."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {'AMX' if has_amx() else ''}"


def _read(file: Path, answers: Sequence[str], *, rows: int) -> dict[str, Tensor] | None:
    try:
        columns = load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s) and will be computed again.", file, error)
        return None
    whole = columns.keys() == set(answers) and all(column.shape == (rows,) for column in columns.values())
    return columns if whole else None


_HASH = "hash_module"


class AgainstStart(MicroBatches):
    """A mix-in for TRL's trainers that compare the policy with ``ref_model``, on rows that are tokenised already.
    ``precomputed`` holds the reference's log-probabilities of the rows if they were computed beforehand. A loss that
    compares nothing does not need a reference; set ``needs_reference`` before ``make_ready``."""

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
    """TRL's trainers without the hash of all weights, which names a cache of TRL that is not used here. For eight
    billion weights it takes a minute, also where no loss needs a reference."""
    modules = {sys.modules[base.__module__] for base in trainer.__mro__}
    functions = {module: getattr(module, _HASH) for module in modules if hasattr(module, _HASH)}
    for module in functions:
        setattr(module, _HASH, lambda *_: "")
    try:
        yield
    finally:
        for module, function in functions.items():
            setattr(module, _HASH, function)


def refuse_other_start(trainer: AgainstStart, rows: Iterable[StartRow]) -> None:
    """Checks that policy and reference agree on every answer of the first batch (``rows``) before the first step. A
    precomputed reference must also have the policy's numbers in its own micro-batches. Raises StageError: they differ,
    so the reference is not the policy that the stage starts from."""
    precomputed = trainer.precomputed
    if precomputed is not None:
        refuse_other_reference(precomputed.start_rows())
    is_rounded = precomputed is not None and precomputed.own.dtype is Dtype.bfloat16
    refuse_other_reference(rows, is_rounded=is_rounded)


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
        policy.delete_adapter("ref")  # the copy that TRL makes for a reference, which ignores any other adapters
        with_own(policy)

        def at_the_start(**inputs: Any) -> Any:
            with at_start(policy):
                return trainer.model(**inputs)

        if trainer.needs_reference:
            trainer.ref_model = at_the_start


def answer_logprobs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """``[rows]`` log-probabilities of the answers in a padded batch, in nats."""
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs: Tensor = model(**texts, labels=_labels_of(batch), use_cache=False, fused_lm_head=True).log_probs
    return logprobs.sum(-1)


def _labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """``[rows, columns]``: the tokens of the answers, made on the host, so that their places are known there."""
    ids, is_answer = on_host(batch["input_ids"], batch["completion_mask"])
    return on_device(ids.masked_fill(is_answer == 0, IGNORED), batch["input_ids"].device)


def with_reference(rows: Dataset, reference: Reference | None, names: Mapping[str, str]) -> Dataset:
    """The rows with the reference's log-probabilities; ``names`` maps its columns to those that TRL expects."""
    if reference is None:
        return rows
    columns: Mapping[str, Tensor] = reference.logprobs
    table = rows.with_format("arrow")[:]  # rows stay memory-mapped unless they were drawn or mixed
    for column, name in names.items():
        table = table.append_column(name, pa.array(columns[column].numpy()))
    return Dataset(table, fingerprint=reference.file.stem)  # without a fingerprint, all rows would be hashed
