"""Log-probabilities of preference pairs under a frozen reference, computed once and kept by content.

A stage with other settings on the same pairs and the same starting policy (a sweep over beta, a second epoch) finds
them again; anything that could change them, weights, tokens, number format, changes the name of the file.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterConfig, AdapterKind, Chain
from alignment.config.model import Dtype
from alignment.models.answers import answer_statistics, batches
from alignment.models.content import weights_sha256
from alignment.models.load import Lineage, products_in
from alignment.stages.pairs import TokenizedPair
from alignment.training.context import StageContext
from alignment.training.sharding import everyones

VERSION = 4
"""Raised when the computation changes, so that older files are not found."""


def reference_logprobs(
    policy: PreTrainedModel, found: Lineage, pairs: Sequence[TokenizedPair], context: StageContext, *, tokens: int
) -> tuple[list[float], list[float]]:
    """Sums over chosen and over rejected answers in nats, one a pair: kept ones, or each process computes its share.

    ``tokens`` are held in memory at once.
    """
    dtype = context.spec.model.dtype
    key = _key(found, pairs, context.adapter, dtype, policy.dtype)
    file = context.spec.artifact.parent / "cache" / f"reference-{key}.safetensors"
    if not _everywhere(file.is_file()):
        context.progress("reference log-probabilities")
        mine = pairs[context.rank :: context.world_size]
        with products_in(dtype, context.device):
            chosen = _sums(policy, mine, [pair.chosen for pair in mine], tokens=tokens)
            rejected = _sums(policy, mine, [pair.rejected for pair in mine], tokens=tokens)
        shares = everyones((chosen, rejected))
        if context.is_main:
            columns = [_interleaved([share[place] for share in shares]) for place in (0, 1)]
            assert all(len(column) == len(pairs) for column in columns), "a process's share is missing"
            _write(file, {"chosen": columns[0], "rejected": columns[1]})
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    saved = load_file(file)
    return saved["chosen"].tolist(), saved["rejected"].tolist()


def _everywhere(here: bool) -> bool:
    """Whether it is so on every process."""
    return all(everyones(here))


def _interleaved(shares: Sequence[Tensor]) -> Tensor:
    """Values of processes that took every n-th pair each, in the order of the pairs."""
    whole = torch.empty(sum(len(share) for share in shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


@torch.no_grad()
def _sums(
    policy: PreTrainedModel, pairs: Sequence[TokenizedPair], answers: Sequence[list[int]], *, tokens: int
) -> Tensor:
    sums: list[Tensor] = []
    for part in batches([pair.prompt for pair in pairs], answers, tokens=tokens, device=policy.device):
        logprobs = answer_statistics(policy, part).logprobs
        sums += [row.sum() for row in logprobs.split(list(part.lengths))]
    return torch.stack(sums).cpu() if sums else torch.empty(0)


def _key(
    found: Lineage, pairs: Sequence[TokenizedPair], adapter: AdapterConfig, dtype: Dtype, weights: torch.dtype
) -> str:
    """``weights`` are held in another format than products are made in where they are trained with masters."""
    nf4 = adapter.kind is AdapterKind.qlora
    beside = adapter.kind is not AdapterKind.full and adapter.chain is not Chain.merge
    stacked = beside and bool(found.adapters)
    told = [VERSION, dtype.value, str(weights), torch.__version__, weights_sha256(found), nf4, stacked]
    sha = hashlib.sha256(json.dumps(told).encode())
    for pair in pairs:
        sha.update(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode())
    return sha.hexdigest()[:32]


def _write(file: Path, columns: dict[str, Tensor]) -> None:
    """By one rename, so that a file cut short is never found; on several machines that share the folder at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{secrets.token_hex(8)}.partial")
    save_file(columns, partial)
    partial.replace(file)
