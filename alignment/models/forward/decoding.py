"""Prepares a model for decoding, with attention that reads the cache in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from alignment.models.assembly.prefix import prefix_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.attention import ATTENTION as FLAT_ATTENTION
from alignment.models.forward.attention import KeysValues
from alignment.models.forward.flat import has_own_mask, refuse_prefix
from alignment.models.forward.rows import on_device
from alignment.models.forward.shared_prompts import Beginning, Reading, can_read, read
from alignment.models.kernels import kv_cache
from alignment.models.kernels.kv_cache import ATTENTION, RowsCache
from alignment.models.kernels.row_attention import without_cudnn

MASKED = {"falcon", "gpt_neox_japanese", "xglm"}
"""Architectures that do not call attention functions by name, but are seen to hide by their mask what is not filled
(tests/unit/models/test_architectures.py); Falcon only without ALiBi."""


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Prepares the model for steps of one token per row, and undoes that."""
    # Parts may differ: Gemma 4's encoder of sounds would refuse the function of its text model.
    implementations = [(config, config._attn_implementation) for config in _configs(model)]
    ours = _gets_ours(model)
    try:
        if ours:
            model.set_attn_implementation(ATTENTION)
        with without_cudnn():
            yield
    finally:
        if ours:
            for config, implementation in implementations:
                config._attn_implementation = implementation


def may_see_room(model: PreTrainedModel) -> bool:
    """Whether the model may see the columns that its ``RowsCache`` allocates ahead, outside of ``decoding``."""
    # Other attention functions may mistake allocated columns for filled ones.
    hides_by_mask = model.config.model_type in MASKED and not getattr(model.config, "alibi", False)
    hides = hides_by_mask or _calls_the_interface(model)
    return _gets_ours(model) or (model.config._attn_implementation in ("eager", "sdpa") and hides)


def next_logits(
    model: PreTrainedModel,
    ids: Tensor,
    seen: Tensor,
    positions: Tensor,
    cache: RowsCache,
    *,
    beginning: KeysValues | None = None,
) -> Tensor:
    """``[rows, vocabulary]`` logits of the token after the last column; ``ids [rows, new columns]`` enter the cache.
    All rows see the tokens of ``beginning`` too, before those of the cache."""
    common = {} if beginning is None else {"beginning": beginning}
    output = model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
        **common,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of the model and of its parts, each before those inside it, because setting one sets those too."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:  # also those that are appended here
        configs += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return configs


def _gets_ours(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in ("sdpa", FLAT_ATTENTION) and _calls_the_interface(model)


def _calls_the_interface(model: PreTrainedModel) -> bool:
    """Whether the model's layers call attention functions by name, with a mask, and leave scores and windows to them.
    GPT-Neo places its window by the number of columns; Bloom and Falcon have a bias (ALiBi, Press et al. 2022) with as
    many columns as were filled. Doge adds to the mask what it computes from the values."""
    return model._can_set_attn_implementation() and not has_own_mask(model)


BLOCK = 256
"""Tokens of the vocabulary whose probabilities are first summed."""


def sampled_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """``[rows]`` tokens from ``[rows, vocabulary]`` logits: the first token whose cumulative probability exceeds the
    row's number in ``uniform [rows]``, float64 in [0, 1). Weights are exp(z − max z) in float32. Sums of blocks are
    accumulated in float64, so that no sum over the whole vocabulary is rounded to float32. The search finds a block
    first, then the token in it."""
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
    1]. A choice of weight 0 is never taken, not even for a ``uniform`` of 0 or 1."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, choice)
    rest = (target - (cumulative.gather(-1, choice) - weight)) / weight
    return choice.squeeze(-1), rest.clamp(0.0, 1.0).squeeze(-1)


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
    vocabulary]`` logits of the tokens after them. Prompts are in ``reading_order``; equal ones are read once. The cache
    has ``rows`` rows and ``length`` filled columns, and the rows end at the last of these. ``reading`` holds what the
    model computed for these prompts, which are given without the tokens of a common ``beginning``. Raises ModelError:
    the model has a prefix, but its attention is not the flat one."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrants:
    """Prompts in ``reading_order`` with their numbers, and ``uniforms [prompts, steps]`` unless the likeliest token is
    taken. ``reading`` holds what the model computed for them, if it has."""

    numbers: Sequence[int]
    prompts: Sequence[Sequence[int]]
    uniforms: Tensor | None
    reading: Reading | None = None


@dataclass(kw_only=True, slots=True)
class WaitingPrompts:
    """Prompts in ``reading_order``, of which the first ``begun`` have been read. ``uniforms`` gives the random numbers
    of some prompts, ``[prompts, steps]``. ``reading`` is of all prompts."""

    prompts: Sequence[Sequence[int]]
    uniforms: Callable[[slice], Tensor] | None
    reading: Reading | None = None
    begun: int = 0

    @property
    def waiting(self) -> int:
        return len(self.prompts) - self.begun

    def cut(self, tokens: int) -> None:
        """Removes so many tokens from the beginning of every prompt."""
        self.prompts = [prompt[tokens:] for prompt in self.prompts]

    def next(self, count: int) -> Entrants:
        """Takes the first that wait, at most so many."""
        count = min(count, self.waiting)
        numbers = range(self.begun, self.begun + count)
        taken = slice(numbers.start, numbers.stop)
        self.begun += count
        return Entrants(
            numbers=numbers,
            prompts=self.prompts[taken],
            uniforms=None if self.uniforms is None else self.uniforms(taken),
            reading=self.reading,
        )

    def next_group(self, most: int) -> Entrants:
        """Takes at most so many, without parting equal prompts unless these are more: they are read once."""
        count = min(most, self.waiting)
        whole = count
        while 0 < whole < self.waiting and self.prompts[self.begun + whole] == self.prompts[self.begun + whole - 1]:
            whole -= 1
        return self.next(whole or count)


DROPPED = 32
"""Columns that are dropped at once, because what follows them is moved."""


@dataclass(kw_only=True, slots=True)
class DecodingRows:
    """The rows of a batch between two steps. ``numbers`` are the prompts that the rows answer. ``filled`` columns of
    the cache have been computed; ``prefix`` ones come first, and row i sees these and those from ``starts[i]`` on,
    which ``seen [rows, columns]`` marks with 1. Before all of that it sees the ``beginning``. ``positions [rows, 1]``
    are those of the last column. ``logits [rows, vocabulary]`` are those of the next token, and ``uniforms [rows,
    steps]`` choose it, at ``steps [rows, 1]``; without them the likeliest token is taken."""

    model: PreTrainedModel
    cache: RowsCache
    beginning: Beginning | None
    prefix: int
    filled: int
    numbers: list[int]
    starts: list[int]
    seen: Tensor
    positions: Tensor
    logits: Tensor
    uniforms: Tensor | None
    steps: Tensor
    max_new_tokens: int

    @classmethod
    def begin(
        cls, model: PreTrainedModel, entrants: Entrants, *, max_new_tokens: int, beginning: Beginning | None = None
    ) -> DecodingRows:
        """A batch of these prompts alone, which continue the ``beginning``."""
        prefix = prefix_of(unwrapped(model).base_model)
        ahead = 0 if prefix is None else prefix.tokens
        filled, rows, device = ahead + len(entrants.prompts[0]), len(entrants.prompts), model.device
        cache = RowsCache(model.config, room=kv_cache.ROOM, shows_room=may_see_room(model))
        at = on_device(torch.arange(rows), device)
        logits = write_prompts(
            model,
            entrants.prompts,
            cache,
            at=at,
            rows=rows,
            length=filled,
            reading=entrants.reading,
            beginning=beginning,
        )
        if prefix is not None:
            cache.put_in_front(prefix.states())
        starts = [filled - len(prompt) for prompt in entrants.prompts]
        return cls(
            model=model,
            cache=cache,
            beginning=beginning,
            prefix=ahead,
            filled=filled,
            numbers=list(entrants.numbers),
            starts=starts,
            seen=_seen(starts, ahead, filled + max_new_tokens, device),
            positions=_last_positions(entrants.prompts, ahead + _tokens(beginning), device),
            logits=logits,
            uniforms=None if entrants.uniforms is None else on_device(entrants.uniforms, device),
            steps=torch.zeros(rows, 1, dtype=torch.long, device=device),
            max_new_tokens=max_new_tokens,
        )

    def enter(self, entrants: Entrants, rows: Sequence[int], *, unfinished: Sequence[int]) -> None:
        """Has prompts take over ``rows`` beside the ``unfinished`` ones. No prompt may be longer than one that entered
        before."""
        seen_from = [*(self.starts[row] for row in unfinished), self.filled - len(entrants.prompts[0])]
        self._drop(min(seen_from) - self.prefix)
        device, at = self.model.device, on_device(torch.tensor(rows), self.model.device)
        logits = write_prompts(
            self.model,
            entrants.prompts,
            self.cache,
            at=at,
            rows=len(self.numbers),
            length=self.filled,
            beginning=self.beginning,
        )
        for row, number, prompt in zip(rows, entrants.numbers, entrants.prompts, strict=True):
            self.numbers[row], self.starts[row] = number, self.filled - len(prompt)
        self.seen = _seen(self.starts, self.prefix, self.filled + self.max_new_tokens, device)
        ahead = self.prefix + _tokens(self.beginning)
        self.positions.index_copy_(0, at, _last_positions(entrants.prompts, ahead, device))
        self.logits = self.logits.index_copy(0, at, logits.to(self.logits.dtype))
        self.steps.index_fill_(0, at, 0)
        if self.uniforms is not None and entrants.uniforms is not None:
            self.uniforms = self.uniforms.index_copy(0, at, on_device(entrants.uniforms, device))

    def keep(self, rows: Sequence[int]) -> Tensor:
        """Keeps only ``rows``, in this order; returns their indices on the device."""
        index = on_device(torch.tensor(rows), self.model.device)
        self.cache.select(index)
        self.numbers, self.starts = [self.numbers[row] for row in rows], [self.starts[row] for row in rows]
        self.seen, self.positions, self.steps = self.seen[index], self.positions[index], self.steps[index]
        self.logits = self.logits[index]
        self.uniforms = None if self.uniforms is None else self.uniforms[index]
        return index

    def next_tokens(self, temperature: float) -> Tensor:
        """``[rows]`` tokens that follow."""
        if self.uniforms is None:
            return self.logits.argmax(-1)
        # A row whose answer has ended may stay for more steps than there are numbers.
        step = self.steps.clamp(max=self.uniforms.shape[1] - 1)
        return sampled_tokens(self.logits, self.uniforms.gather(1, step).squeeze(1), temperature)

    def step(self, tokens: Tensor) -> None:
        """Appends ``[rows]`` tokens, a column, and computes the logits behind them."""
        self.filled += 1
        # A row whose answer has ended may stay, and must not run out of the positions that the model has.
        self.positions += self.steps < self.max_new_tokens
        self.steps += 1
        self.logits = next_logits(
            self.model,
            tokens[:, None],
            self.seen[:, : self.filled],
            self.positions,
            self.cache,
            beginning=None if self.beginning is None else self.beginning.keys_values,
        )

    @property
    def free_columns(self) -> int:
        """Number of steps that can be taken before the cache grows."""
        return self.cache.free_columns

    def skip(self, steps: int) -> None:
        """Goes on as if so many steps had been taken; the cache has columns for them, with no numbers."""
        self.filled += steps
        self.positions += steps
        self.steps += steps
        self.cache.skip(steps)

    def _drop(self, columns: int) -> None:
        if columns < DROPPED:
            return
        self.cache.drop(columns, after=self.prefix)
        self.filled -= columns
        self.starts = [max(self.prefix, start - columns) for start in self.starts]


def _seen(starts: Sequence[int], prefix: int, columns: int, device: torch.device) -> Tensor:
    """``[rows, columns]``: 1 on the prefix, and from a row's start on."""
    column = torch.arange(columns)
    return on_device(((column >= torch.tensor(starts)[:, None]) | (column < prefix)).long(), device)


def _tokens(beginning: Beginning | None) -> int:
    return 0 if beginning is None else beginning.tokens


def _last_positions(prompts: Sequence[Sequence[int]], ahead: int, device: torch.device) -> Tensor:
    return on_device(torch.tensor([[ahead + len(prompt) - 1] for prompt in prompts]), device)
