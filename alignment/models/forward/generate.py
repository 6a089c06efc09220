"""Batched answers with a key-value cache: greedy, or pure ancestral sampling at a temperature.

No top-k, top-p or repetition penalty can leak in from a model's generation config. Sampling inverts the cumulative
distribution at one uniform number per row and step, drawn beforehand. So the same seed gives the same answers for any
batch size and any set of finished rows, except for the rounding of bfloat16 products of other shapes. Equal prompts are
read once. Finished rows leave the batch and the cache when they are numerous enough to pay for moving the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.costs.recorder import on_shadows
from alignment.models.assembly.prefix import prefix_of, refuse_too_long
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.decoding import decoding
from alignment.models.forward.flat import refuse_prefix
from alignment.models.forward.shared_prompts import Reading, can_read, read
from alignment.models.forward.transfer import on_device
from alignment.models.kernels.kv_cache import RowsCache
from alignment.models.kernels.layout import prepacked

PREFILL_TOKENS = 1024
"""Prompt tokens read at once if they are padded; a few rows of similar length need little padding."""

FULL_ENOUGH = 0.75
"""Share of unfinished rows above which finished rows stay, because a few rows less hardly make a step cheaper."""

ASSUMED_LENGTHS = 8
"""How many lengths the answers of a batch have where no token is computed."""

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are first summed."""

OnToken = Callable[[int, int], None]
"""Called with the index of the prompt and the token id for each token as it is generated."""

Ends = Callable[[Sequence[int]], bool]
"""Called with an answer's tokens after each new one; returns whether the answer ends there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Ancestral sampling: ``uniforms [prompts, steps]`` in [0, 1), float64, one number per prompt and step."""

    temperature: float
    uniforms: Tensor


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    batch_size: int,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
    on_token: OnToken | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """Answers to ``prompts`` (token ids), in their order; an answer ends with one of ``end_ids`` or at the limit.

    Without ``sampling`` the most likely token is taken. ``progress`` is called with the number of prompts done,
    ``on_token`` with each new token. ``ends`` is a further condition for the end of an answer. On CPU in bfloat16 the
    linear weights are meanwhile in memory twice.

    Raises:
        ValueError: a prompt is empty.
        ModelError: the model has layers that cache something else than keys and values, or a prompt and its answer may
            be longer than the model's positions.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no token")
    answers: list[list[int]] = [[] for _ in prompts]
    order = reading_order(prompts)
    with prepacked(model, min(batch_size, len(prompts))):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            batch_answers = answer_batch(
                model,
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                end_ids=end_ids,
                temperature=1.0 if sampling is None else sampling.temperature,
                uniforms=None if sampling is None else sampling.uniforms[batch],
                on_token=None if on_token is None else _of_batch(on_token, batch),
                ends=ends,
            )
            for index, answer in zip(batch, batch_answers, strict=True):
                answers[index] = answer
            if progress is not None:
                progress(start + len(batch))
    return answers


def reading_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the prompts, longest first, so that there is little padding; equal prompts are adjacent."""
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])), reverse=True)


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    on_token: OnToken | None = None,
    reading: Reading | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """Like ``generate`` for one batch of prompts in ``reading_order``; samples if given ``uniforms [prompts, steps]``.

    ``reading`` holds what the model computed for these prompts; without it they are read here.
    """
    base = unwrapped(model)
    refuse_too_long(base.base_model, len(prompts[0]) + max_new_tokens)
    if reading is None and can_read(base):
        reading = read(base, prompts)
    with decoding(model) as room:
        begun = _begin(model, prompts, reading, room)
        del reading  # its keys and values are in the cache now; a caller that still needs it holds its own reference
        return _continue(
            model,
            begun,
            max_new_tokens=max_new_tokens,
            end_ids=frozenset(end_ids),
            temperature=temperature,
            uniforms=uniforms,
            on_token=on_token,
            ends=ends,
        )


def _of_batch(on_token: OnToken, indices: Sequence[int]) -> OnToken:
    return lambda row, token: on_token(indices[row], token)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """A batch whose prompts were read.

    It has the cache, ``[rows, vocabulary]`` logits of the first new tokens, and ``seen [rows, columns]``, which is 1 on
    the columns that a row sees. A row's last column is its prompt's last token.
    """

    cache: RowsCache
    logits: Tensor
    seen: Tensor


def _continue(
    model: PreTrainedModel,
    begun: _Begun,
    *,
    max_new_tokens: int,
    end_ids: frozenset[int],
    temperature: float,
    uniforms: Tensor | None,  # [rows, steps]
    on_token: OnToken | None,
    ends: Ends | None,
) -> list[list[int]]:
    cache, logits, width = begun.cache, begun.logits, begun.seen.shape[1]
    answers: list[list[int]] = [[] for _ in logits]
    rows = list(range(len(answers)))  # the answer that each row of the batch belongs to
    unfinished = set(rows)
    if uniforms is not None:
        uniforms = on_device(uniforms, model.device)
    seen = nn.functional.pad(begun.seen, (0, max_new_tokens), value=1)
    positions = seen[:, :width].sum(-1, keepdim=True) - 1
    for step in range(max_new_tokens):
        tokens = logits.argmax(-1) if uniforms is None else _sample(logits, uniforms[:, step], temperature)
        if on_shadows():
            tokens = torch.tensor([_assumed(row, max_new_tokens - step, end_ids) for row in rows], device=model.device)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in unfinished:
                answers[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if token in end_ids or (ends is not None and ends(answers[row])):
                    unfinished.remove(row)
        if not unfinished or step == max_new_tokens - 1:
            break
        if len(unfinished) <= FULL_ENOUGH * len(rows):
            indices = [index for index, row in enumerate(rows) if row in unfinished]
            unfinished_rows = on_device(torch.tensor(indices), model.device)
            rows = [row for row in rows if row in unfinished]
            cache.select(unfinished_rows)
            tokens, seen, positions = tokens[unfinished_rows], seen[unfinished_rows], positions[unfinished_rows]
            uniforms = None if uniforms is None else uniforms[unfinished_rows]
        positions += 1
        logits = _next_logits(model, tokens[:, None], seen[:, : width + step + 1], positions, cache)
    return answers


def _assumed(row: int, steps_left: int, end_ids: frozenset[int]) -> int:
    """A token where none is computed. Answers get nearly as long as they may be, because shorter ones cost less, but
    not all equally long: otherwise every tensor would fit where an earlier one was."""
    ends = steps_left == 1 + row % ASSUMED_LENGTHS
    return min(end_ids if ends and end_ids else set(range(len(end_ids) + 1)) - end_ids)


def _begin(model: PreTrainedModel, prompts: Sequence[Sequence[int]], reading: Reading | None, room: int) -> _Begun:
    """The first state of a batch of prompts in ``reading_order``."""
    base = unwrapped(model)
    if reading is None:
        refuse_prefix(base.base_model)
        return _read_padded(model, prompts, room)
    cache, logits = reading.cache(base, room=room), reading.logits(base)
    prefix = prefix_of(base.base_model)
    seen = nn.functional.pad(_seen(prompts, model.device), (0 if prefix is None else prefix.tokens, 0), value=1)
    return _Begun(cache=cache, logits=logits, seen=seen)


def _read_padded(model: PreTrainedModel, prompts: Sequence[Sequence[int]], room: int) -> _Begun:
    """Reads left-padded prompts, some at a time, with a model whose attention is not flat."""
    cache, columns = RowsCache(model.config, room=room), len(prompts[0])
    logits, masks = [], []
    first = 0
    for batch, repeats in _prefill_batches(prompts):
        seen = _seen(batch, model.device)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        own = RowsCache(model.config, room=0)
        batch_logits = _next_logits(model, _left_padded(batch, model.device), seen, positions, own)
        sources = torch.arange(len(batch)).repeat_interleave(torch.tensor(repeats)).to(model.device)
        cache.write(own, sources, first=first, rows=len(prompts), length=columns)
        logits.append(batch_logits[sources])
        masks.append(nn.functional.pad(seen[sources], (columns - seen.shape[1], 0)))
        first += len(sources)
    return _Begun(cache=cache, logits=torch.cat(logits), seen=torch.cat(masks))


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


def _next_logits(model: PreTrainedModel, ids: Tensor, seen: Tensor, positions: Tensor, cache: RowsCache) -> Tensor:
    """``[rows, vocabulary]`` logits of the token after the last column."""
    output = model(
        input_ids=ids, attention_mask=seen, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """``[rows]`` tokens: the first whose cumulative probability exceeds the row's uniform number.

    Weights are exp(z − max z) in float32. Sums of blocks are accumulated in float64, so that no sum over the whole
    vocabulary is rounded to float32. The search finds a block first, then the token in it.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    weights = torch.empty(rows, blocks * BLOCK, dtype=torch.float32, device=logits.device)
    weights[:, :vocabulary] = logits
    weights[:, vocabulary:] = float("-inf")
    weights.sub_(weights.amax(-1, keepdim=True))
    if temperature != 1.0:
        weights.div_(temperature)
    weights = weights.exp_().view(rows, blocks, BLOCK)
    block, rest = _invert(weights.sum(-1).double(), uniform)
    inside = weights[torch.arange(rows, device=block.device), block]
    return block * BLOCK + _invert(inside.double(), rest)[0]


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of ``[rows, choices]``: the choice whose share contains ``uniform``, and its position in it, in [0,
    1].

    A choice of weight 0 is never taken, not even for a ``uniform`` of 0 or 1.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, choice)
    rest = (target - (cumulative.gather(-1, choice) - weight)) / weight
    return choice.squeeze(-1), rest.clamp(0.0, 1.0).squeeze(-1)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    length = len(prompts[0])
    return torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)


def _seen(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """``[prompts, columns]``: 1 from a prompt's first token on. The first prompt is the longest and begins at column
    0."""
    starts = torch.tensor([len(prompts[0]) - len(prompt) for prompt in prompts])
    return on_device((torch.arange(len(prompts[0])) >= starts[:, None]).long(), device)
