"""Log-probabilities of answers under a frozen reference, computed once and cached by content.

A stage with other settings on the same rows and starting policy (as in a sweep over beta) reads them from the cache.
The file name depends on everything that could change them: weights, tokens, number format and device.
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
from alignment.costs.recorder import on_shadows, some_of
from alignment.models.assembly.load import Lineage, products_in
from alignment.models.assembly.weight_file import write_weights
from alignment.models.assembly.weights_hash import weights_sha256
from alignment.models.forward.answers import answer_statistics, answer_stream, micro_batches_of
from alignment.stages.shared.preference_pairs import rows_of
from alignment.training.context import StageContext
from alignment.training.sharding import everyones

log = logging.getLogger(__name__)

VERSION = 6
"""Raised when the computation changes, so that older files are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Log-probabilities of answers, ``[rows]`` in nats, by the column of the answers; and the file that caches them.

    The file may not exist yet. ``is_final``: it may be written.
    """

    logprobs: Mapping[str, Tensor]
    file: Path
    is_final: bool = True

    def keep(self) -> None:
        """Writes the file if it may be written, unless it exists and is complete.

        One process calls this, after the sums were checked.
        """
        rows = {len(column) for column in self.logprobs.values()}
        if self.is_final and _read(self.file, tuple(self.logprobs), rows=rows.pop()) is None:
            _write(self.file, dict(self.logprobs))


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
    dtype = context.spec.model.dtype
    key = _key(start, rows_of(rows, "prompt", *answers), context.adapter, dtype, policy.dtype, context.device)
    file = context.spec.artifact.parent / "cache" / f"reference-{key}.safetensors"
    columns = _read(file, answers, rows=len(rows))
    if all(everyones(columns is not None)) and columns is not None:
        return Reference(file=file, logprobs=columns)
    context.progress("reference log-probabilities")
    share = rows.shard(num_shards=context.world_size, index=context.rank, contiguous=False)
    with products_in(dtype, context.device):
        own = [_sums(policy, share, answer, tokens=tokens) for answer in answers]
    sums = [_interleaved(shares) for shares in zip(*everyones(own), strict=True)]
    assert all(len(column) == len(rows) for column in sums), "a process's share is missing"
    # During a search for the size of micro-batches they are those of another size, which would round otherwise.
    is_final = context.search is None and not on_shadows()
    return Reference(file=file, logprobs=dict(zip(answers, sums, strict=True)), is_final=is_final)


def _interleaved(shares: Sequence[Tensor]) -> Tensor:
    """The values in the order of the rows; each of n processes computed every n-th row."""
    whole = torch.empty(sum(len(share) for share in shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


@torch.no_grad()
def _sums(policy: PreTrainedModel, rows: Dataset, answer: str, *, tokens: int) -> Tensor:
    """``[rows]`` log-probabilities of the answers in the column ``answer``."""

    def size(micro_batch: range) -> int:
        texts = rows[micro_batch.start : micro_batch.stop]
        return sum(map(len, [*texts["prompt"], *texts[answer]]))

    sums: list[Tensor] = []
    for micro_batch in some_of(micro_batches_of(rows_of(rows, "prompt", answer), tokens=tokens), size):
        texts = rows[micro_batch.start : micro_batch.stop]
        part = answer_stream(texts["prompt"], texts[answer], policy.device)
        logprobs = answer_statistics(policy, part).logprobs
        sums += [row.sum() for row in logprobs.split(list(part.lengths))]
    if on_shadows():  # where no number means anything, and not all rows were read
        return torch.ones(len(rows))
    return torch.stack(sums).cpu() if sums else torch.empty(0)


def _key(
    start: Lineage,
    rows: Iterable[tuple[list[int], ...]],
    adapter: AdapterConfig,
    dtype: Dtype,
    weights: torch.dtype,
    device: torch.device,
) -> str:
    """The cache key. With master weights, the format of the ``weights`` differs from the ``dtype`` of products."""
    nf4 = adapter.kind is AdapterKind.qlora
    keeps_adapters = adapter.kind is not AdapterKind.full and adapter.chain is not Chain.merge
    stacked = keeps_adapters and bool(start.adapters)
    made_by = [torch.__version__, _device_name(device)]
    content = "" if on_shadows() else weights_sha256(start)  # an estimate reads no weights
    prefix = adapter.virtual_tokens if adapter.kind is AdapterKind.prefix else 0  # a new one takes a share of attention
    shaped_by = [VERSION, dtype.value, str(weights), *made_by, content, nf4, stacked, prefix]
    sha = hashlib.sha256(json.dumps(shaped_by).encode())
    for row in rows:
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def _device_name(device: torch.device) -> str:
    """GPU models round differently from one another, and from a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
