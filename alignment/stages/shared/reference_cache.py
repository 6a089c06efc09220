"""Log-probabilities of answers under a frozen reference, computed once and cached by content.

A stage with other settings on the same rows and starting policy (as in a sweep over beta) reads them from the cache.
The file name depends on everything that could change them: weights, tokens, number format, device and micro-batches.
In bfloat16 a log-probability also depends on the rows of its micro-batch and on the processor. So what is compared with
a cached one is computed in the same micro-batch, and a file that another processor wrote is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterConfig, AdapterKind, Chain
from alignment.config.model import Dtype
from alignment.core.files import remove_leftovers, replacing
from alignment.core.hardware import has_amx
from alignment.costs.recorder import on_shadows, some_of
from alignment.models.assembly.load import Lineage, products_in
from alignment.models.assembly.weight_file import write_weights
from alignment.models.assembly.weights_hash import weights_sha256
from alignment.models.forward.answers import answer_statistics, answer_stream, micro_batches_of
from alignment.stages.shared.preference_pairs import rows_of
from alignment.stages.shared.start_check import START_TOLERANCE, StartRow
from alignment.training.context import StageContext
from alignment.training.sharding import everyones

log = logging.getLogger(__name__)

VERSION = 7
"""Raised when the computation changes, so that older files are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Log-probabilities of answers, ``[rows]`` in nats, by the column of the answers; and the file that caches them.

    The file may not exist yet. ``is_final``: it may be written. ``own`` computes this process's share of the rows.
    """

    logprobs: Mapping[str, Tensor]
    file: Path
    own: OwnRows
    is_final: bool = True

    def start_rows(self) -> list[StartRow]:
        """Answers of this process beside their reference, computed with the policy as it is now.

        They are those of the first micro-batch of each column, as in bfloat16 other micro-batches give other values.
        """
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
        """Writes the file if it may be written, unless it has these numbers.

        One process calls this, after the sums were checked.
        """
        rows = {len(column) for column in self.logprobs.values()}
        known = _read(self.file, tuple(self.logprobs), rows=rows.pop()) if self.is_final else self.logprobs
        if known is None or any(not torch.equal(known[name], own) for name, own in self.logprobs.items()):
            _write(self.file, dict(self.logprobs))


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


def reference_logprobs(
    policy: PreTrainedModel,
    start: Lineage,
    rows: Dataset,
    context: StageContext,
    *,
    answers: Sequence[str],
    tokens: int,
) -> Reference:
    """The reference of all rows, from the cache, or computed, with each process computing its share.

    ``answers`` are the columns of the answers to the column ``prompt``. ``policy`` must be in evaluation mode;
    ``tokens`` limits the tokens of a micro-batch.
    """
    assert not policy.training, "dropout would be active"
    own = OwnRows(
        policy=policy,
        rows=rows.shard(num_shards=context.world_size, index=context.rank, contiguous=False),
        dtype=context.spec.model.dtype,
        tokens=tokens,
        rank=context.rank,
        world_size=context.world_size,
    )
    shaped_by = [own.dtype.value, str(policy.dtype), _device_name(context.device), tokens, context.world_size]
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
    sums = [_interleaved(of_answer) for of_answer in zip(*shares, strict=True)]
    assert all(len(column) == len(rows) for column in sums), "a process's share is missing"
    # During a search for the size of micro-batches, they are those of another size.
    is_final = context.search is None and not on_shadows()
    return Reference(logprobs=dict(zip(answers, sums, strict=True)), file=file, own=own, is_final=is_final)


def _interleaved(shares: Sequence[Tensor]) -> Tensor:
    """The values in the order of the rows; each of n processes computed every n-th row."""
    whole = torch.empty(sum(len(share) for share in shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


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
    """The columns of a cached file; None if it is missing or damaged, so that it is computed again."""
    try:
        columns = load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s) and will be computed again.", file, error)
        return None
    whole = columns.keys() == set(answers) and all(column.shape == (rows,) for column in columns.values())
    return columns if whole else None


def _write(file: Path, columns: dict[str, Tensor]) -> None:
    """Writes with one rename, so that no machine that shares the folder ever sees an incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(file.parent, shared=True)
    with replacing(file) as temporary:
        write_weights(columns, temporary)
