"""Prompts that a model reads once, to sample answers or to score texts that follow them. A reading holds the keys and
values of every layer and the last state of each prompt, from the flat forward. Later streams continue them as an
earlier stream (models/forward/rows.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.costs.recorder import is_on_cpu
from alignment.data.tokens.rendering import in_common
from alignment.models.forward.attention import ATTENTION, KeysValues
from alignment.models.forward.flat import has_window, trunk_states
from alignment.models.forward.head import capped, label_statistics, logit_cap, scales_logits
from alignment.models.forward.rows import (
    FlatRows,
    behind,
    behind_one,
    by_tokens,
    evenly,
    next_multiple,
    on_device,
    on_host,
    stream,
)
from alignment.models.forward.side_by_side import THREADS, can_divide, can_share, each_of
from alignment.models.kernels.kv_cache import RowsCache

READ_TOKENS = 8192
"""Tokens that are read or scored at once, by all threads; a longer text is read alone. Each pass has a cost of its own
beside that of its tokens, and without gradients a token needs little memory (docs/LOG.md, 2026-11-29)."""
_CACHES_OTHERWISE = {"diffllama", "dory", "hrm_text", "jetmoe"}
"""Architectures that repeat heads after the cache, call attention twice with halves of the values, or run their layers
several times, with a cache for each time."""
_Output = TypeVar("_Output")


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """The ``tokens`` tokens that all prompts begin with, read once: keys and values of every layer."""

    tokens: int
    keys_values: KeysValues


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Distinct prompts read together: their stream, its keys and values, and ``[prompts, width]`` last states.
    ``asked`` holds, for each prompt of the reading in this batch, the row of the stream that it is."""

    rows: FlatRows
    keys_values: KeysValues
    ends: Tensor
    asked: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Prompts that were read, in order, in batches."""

    batches: tuple[PromptBatch, ...]

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """``[prompts, vocabulary]`` logits of the first token after each prompt."""
        head = model.get_output_embeddings()
        return torch.cat([capped(head(batch.ends), logit_cap(model))[batch.asked] for batch in self.batches])

    def write(self, cache: RowsCache, *, at: Tensor, rows: int, length: int) -> None:
        """Writes the keys and values of the prompts as the rows ``at [prompts]`` of a decoding batch. The batch has
        ``rows`` rows, and ``length`` filled columns. Rows are right-aligned."""
        for batch, batch_at in zip(self.batches, at.split([len(batch.asked) for batch in self.batches]), strict=True):
            indices = _right_aligned(batch.rows)[batch.asked]
            cache.write_stream(batch.keys_values, indices, at=batch_at, rows=rows, length=length)

    @torch.no_grad()
    def logprobs(self, model: PreTrainedModel, texts: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Sums of log p(token | everything before it), in nats, of any number of texts after each prompt. ``model`` is
        the one that has read the prompts. No text may be empty."""
        sums_of_prompts: list[list[float]] = []
        for batch in self.batches:
            of_batch = texts[len(sums_of_prompts) : len(sums_of_prompts) + len(batch.asked)]
            (asked,) = on_host(batch.asked)
            rows = [row for row, of_prompt in zip(asked.tolist(), of_batch, strict=True) for _ in of_prompt]
            sums = iter(_logprobs(model, batch, rows, [text for of_prompt in of_batch for text in of_prompt]))
            sums_of_prompts += [[next(sums) for _ in of_prompt] for of_prompt in of_batch]
        return sums_of_prompts


def can_read(model: PreTrainedModel) -> bool:
    """Whether the model has flat attention, which sees what its cache holds, and a head that neither scales nor has a
    bias; ``model`` has no wrapper."""
    return model.config._attn_implementation == ATTENTION and _caches_what_it_sees(model) and not scales_logits(model)


def _caches_what_it_sees(model: PreTrainedModel) -> bool:
    """Whether each layer calls attention once, with the keys and values that it caches under its own number. Latent
    attention (DeepSeek-AI 2024) caches what keys and values are computed from."""
    config = model.config.get_text_config()
    return getattr(config, "kv_lora_rank", None) is None and config.model_type not in _CACHES_OTHERWISE


@torch.no_grad()
def read_beginning(model: PreTrainedModel, tokens: Sequence[int]) -> Beginning:
    """Reads tokens that all prompts begin with, with a model that ``can_read``."""
    keys_values = KeysValues()
    trunk_states(model.base_model, stream([tokens], model.device), keys_values=keys_values)
    return Beginning(tokens=len(tokens), keys_values=keys_values)


@torch.no_grad()
def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, beginning: Beginning | None = None) -> Reading:
    """Reads non-empty prompts (token ids) with a model that ``can_read``; adjacent equal prompts are read once. Prompts
    continue the ``beginning``, and are given without its tokens. Texts after such prompts cannot be scored. Raises
    ModelError: a prompt is longer than the model's positions."""
    different = [(prompt, len(list(equal))) for prompt, equal in groupby(prompts, key=tuple)]

    def read_batch(span: range) -> PromptBatch:
        batch = different[span.start : span.stop]
        rows, keys_values = stream([prompt for prompt, _ in batch], model.device), KeysValues()
        if beginning is None:
            ends = trunk_states(model.base_model, rows, keys_values=keys_values)[rows.ends]
        else:
            continued = behind_one(beginning.tokens, rows)
            states = trunk_states(model.base_model, continued, keys_values=keys_values, earlier=beginning.keys_values)
            ends = states[rows.ends]
        asked = torch.arange(len(batch)).repeat_interleave(torch.tensor([count for _, count in batch]))
        return PromptBatch(rows=rows, keys_values=keys_values, ends=ends, asked=on_device(asked, model.device))

    return Reading(batches=tuple(_by_span([len(prompt) for prompt, _ in different], model, read_batch)))


def _by_span(lengths: Sequence[int], model: PreTrainedModel, function: Callable[[range], _Output]) -> list[_Output]:
    if can_divide(model.base_model):
        count = len(by_tokens(lengths, READ_TOKENS // THREADS))
        spans = evenly(lengths, next_multiple(count, THREADS))
        costs = [sum(lengths[text] for text in span) for span in spans]
        if can_share(costs):
            return each_of(spans, function, costs)
    return [function(span) for span in by_tokens(lengths, READ_TOKENS)]


def _right_aligned(rows: FlatRows) -> Tensor:
    columns = rows.index.shape[1]
    shifted = torch.arange(columns, device=rows.index.device) - (columns - rows.is_real.sum(-1, keepdim=True))
    return rows.index.gather(1, shifted.clamp(min=0))


def _logprobs(model: PreTrainedModel, batch: PromptBatch, which: list[int], texts: list[Sequence[int]]) -> list[float]:

    def sums_of(span: range) -> list[float]:
        span_texts, after = texts[span.start : span.stop], which[span.start : span.stop]
        rows = behind(batch.rows, after, span_texts)
        states = trunk_states(model.base_model, rows, earlier=batch.keys_values)
        # The prompt's last token predicts a text's first token; every other token is predicted by the one before it.
        predicting = states.roll(1, 0)
        predicting[rows.index[:, 0]] = batch.ends[on_device(torch.tensor(after), batch.ends.device)]
        logprobs = label_statistics(model, predicting, rows.input_ids).logprobs
        return torch.stack([own.sum() for own in logprobs.split([len(text) for text in span_texts])]).tolist()

    return list(chain.from_iterable(_by_span([len(text) for text in texts], model, sums_of)))


FEWEST_TOKENS = 64
"""Tokens below which a common beginning is read and held with each prompt, because attending elsewhere costs more than
it saves (docs/LOG.md, 2026-11-28)."""
FEWEST_ROWS = 8
"""Rows of a batch below which it is."""


def shared_beginning(model: PreTrainedModel, prompts: Sequence[Sequence[int]], rows: int) -> Beginning | None:
    """What all of the prompts begin with, or None if it is short, if there are few ``rows``, or if the model's decoding
    attention cannot attend to it; ``model`` has no wrapper. Every prompt has at least one more token."""
    if rows < FEWEST_ROWS or not _can_share(model):
        return None
    # What the first and the last in lexical order begin with, all do.
    tokens = min(in_common(min(prompts, key=tuple), max(prompts, key=tuple)), min(map(len, prompts)) - 1)
    return read_beginning(model, prompts[0][:tokens]) if tokens >= FEWEST_TOKENS else None


def _can_share(model: PreTrainedModel) -> bool:
    """Whether attention sees all earlier columns, without a cap, in products on a CPU."""
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    on_cpu = is_on_cpu(model.get_input_embeddings().weight)
    return on_cpu and can_read(model) and not capped and not has_window(model)
