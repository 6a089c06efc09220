"""Log-probabilities of preference pairs under a frozen reference, computed once and cached by content.

A stage with other settings on the same pairs and starting policy (as in a sweep over beta) reads them from the cache.
The file name depends on everything that could change them: weights, tokens, number format and device.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterConfig, AdapterKind, Chain
from alignment.config.model import Dtype
from alignment.core.files import remove_leftovers, replacing
from alignment.models.assembly.load import Lineage, products_in
from alignment.models.assembly.weights_hash import weights_sha256
from alignment.models.forward.answers import answer_statistics, answer_stream, micro_batches_of
from alignment.stages.shared.preference_pairs import rows_of
from alignment.training.context import StageContext
from alignment.training.sharding import everyones

log = logging.getLogger(__name__)

VERSION = 5
"""Raised when the computation changes, so that older files are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Log-probabilities of the chosen and of the rejected answers, ``[pairs]`` in nats, and the file that caches them.

    The file may not exist yet.
    """

    chosen: Tensor
    rejected: Tensor
    file: Path

    def keep(self) -> None:
        """Writes the file unless it exists and is complete. One process calls this, after the sums were checked."""
        if _read(self.file, pairs=len(self.chosen)) is None:
            _write(self.file, {"chosen": self.chosen, "rejected": self.rejected})


def reference_logprobs(
    policy: PreTrainedModel, start: Lineage, pairs: Dataset, context: StageContext, *, tokens: int
) -> Reference:
    """The reference of all pairs, from the cache, or computed, with each process computing its share.

    ``policy`` must be in evaluation mode; ``tokens`` limits the tokens of a micro-batch.
    """
    assert not policy.training, "dropout would be active"
    dtype = context.spec.model.dtype
    key = _key(start, pairs, context.adapter, dtype, policy.dtype, context.device)
    file = context.spec.artifact.parent / "cache" / f"reference-{key}.safetensors"
    columns = _read(file, pairs=len(pairs))
    if all(everyones(columns is not None)) and columns is not None:
        return Reference(file=file, **columns)
    context.progress("reference log-probabilities")
    share = pairs.shard(num_shards=context.world_size, index=context.rank, contiguous=False)
    with products_in(dtype, context.device):
        chosen, rejected = (_sums(policy, share, answer, tokens=tokens) for answer in ("chosen", "rejected"))
    sums = [_interleaved(shares) for shares in zip(*everyones((chosen, rejected)), strict=True)]
    assert all(len(column) == len(pairs) for column in sums), "a process's share is missing"
    return Reference(chosen=sums[0], rejected=sums[1], file=file)


def _interleaved(shares: Sequence[Tensor]) -> Tensor:
    """The values in the order of the pairs; each of n processes computed every n-th pair."""
    whole = torch.empty(sum(len(share) for share in shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


@torch.no_grad()
def _sums(policy: PreTrainedModel, pairs: Dataset, answer: str, *, tokens: int) -> Tensor:
    """``[pairs]`` log-probabilities of the answers in the column ``answer``."""
    sums: list[Tensor] = []
    for micro_batch in micro_batches_of(rows_of(pairs, "prompt", answer), tokens=tokens):
        rows = pairs[micro_batch.start : micro_batch.stop]
        part = answer_stream(rows["prompt"], rows[answer], policy.device)
        logprobs = answer_statistics(policy, part).logprobs
        sums += [row.sum() for row in logprobs.split(list(part.lengths))]
    return torch.stack(sums).cpu() if sums else torch.empty(0)


def _key(
    start: Lineage,
    pairs: Dataset,
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
    shaped_by = [VERSION, dtype.value, str(weights), *made_by, weights_sha256(start), nf4, stacked]
    sha = hashlib.sha256(json.dumps(shaped_by).encode())
    for row in rows_of(pairs, "prompt", "chosen", "rejected"):
        sha.update(json.dumps(row).encode())
    return sha.hexdigest()[:32]


def _device_name(device: torch.device) -> str:
    """GPU models round differently from one another, and from a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(file: Path, *, pairs: int) -> dict[str, Tensor] | None:
    """The columns of a cached file; None if it is missing or damaged, so that it is computed again."""
    try:
        columns = load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s); it will be computed again.", file, error)
        return None
    whole = columns.keys() == {"chosen", "rejected"} and all(column.shape == (pairs,) for column in columns.values())
    return columns if whole else None


def _write(file: Path, columns: dict[str, Tensor]) -> None:
    """Writes with one rename, so that no machine that shares the folder ever sees an incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(file.parent, shared=True)
    with replacing(file) as temporary:
        save_file(columns, temporary)
