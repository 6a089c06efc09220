"""Reads prompts into the cache of a decoding batch: in one stream where the model allows it, otherwise padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.forward.answers import unwrapped
from alignment.models.forward.decoding import decoding, next_logits
from alignment.models.forward.flat import refuse_prefix
from alignment.models.forward.shared_prompts import Beginning, Reading, can_read, read
from alignment.models.forward.transfer import on_device
from alignment.models.kernels.kv_cache import RowsCache

PREFILL_TOKENS = 1024
"""Prompt tokens read at once if they are padded; a few rows of similar length need little padding."""


def write_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    cache: RowsCache,
    *,
    at: Tensor,
    rows: int,
    length: int,
    reading: Reading | None = None,
    beginning: Beginning | None = None,
) -> Tensor:
    """Writes the keys and values of prompts as the rows ``at [prompts]`` of a cache, and returns ``[prompts,
    vocabulary]`` logits of the tokens after them.

    Prompts are in ``reading_order``; equal ones are read once. The cache has ``rows`` rows and ``length`` filled
    columns, and the rows end at the last of these. ``reading`` holds what the model computed for these prompts, which
    are given without the tokens of a common ``beginning``.

    Raises:
        ModelError: the model has a prefix, but its attention is not the flat one.
    """
    base = unwrapped(model)
    if reading is None and can_read(base):
        reading = read(base, prompts, beginning=beginning)
    if reading is not None:
        reading.write(cache, at=at, rows=rows, length=length)
        return reading.logits(base)
    refuse_prefix(base.base_model)
    with decoding(model):
        return _write_padded(model, prompts, cache, at=at, rows=rows, length=length)


def _write_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: RowsCache, *, at: Tensor, rows: int, length: int
) -> Tensor:
    """Reads left-padded prompts, some at a time, with a model whose attention is not flat."""
    logits = []
    first = 0
    for batch, repeats in _prefill_batches(prompts):
        columns = len(batch[0])
        starts = torch.tensor([columns - len(prompt) for prompt in batch])
        seen = on_device((torch.arange(columns) >= starts[:, None]).long(), model.device)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        own = RowsCache(model.config, room=0)
        batch_logits = next_logits(model, _left_padded(batch, model.device), seen, positions, own)
        sources = torch.arange(len(batch)).repeat_interleave(torch.tensor(repeats)).to(model.device)
        cache.write(own, sources, at=at[first : first + len(sources)], rows=rows, length=length)
        logits.append(batch_logits[sources])
        first += len(sources)
    return torch.cat(logits)


def _prefill_batches(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[Sequence[int]], list[int]]]:
    """Yields distinct prompts of at most ``PREFILL_TOKENS`` padded tokens, or a single longer one, and their counts."""
    batch: list[Sequence[int]] = []
    repeats: list[int] = []
    for _, group in groupby(prompts, key=tuple):
        equal = list(group)
        if batch and (len(batch) + 1) * len(batch[0]) > PREFILL_TOKENS:
            yield batch, repeats
            batch, repeats = [], []
        batch.append(equal[0])
        repeats.append(len(equal))
    yield batch, repeats


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    length = len(prompts[0])
    return torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
