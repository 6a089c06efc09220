"""The rows of a decoding batch, where a waiting prompt takes over the row of an answer that has ended.

All rows share their last column. A prompt that enters is written right-aligned behind the last columns of the others,
and its row sees nothing before it. Columns that no row sees any more are dropped when prompts enter. So the cache never
holds more than the longest prompt with its answer, and about ``DROPPED + ROOM`` columns beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.assembly.prefix import prefix_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.decoding import may_see_room, next_logits
from alignment.models.forward.entering_prompts import write_prompts
from alignment.models.forward.shared_prompts import Beginning
from alignment.models.forward.token_choice import sampled_tokens
from alignment.models.forward.transfer import on_device
from alignment.models.forward.waiting_prompts import Entrants
from alignment.models.kernels import kv_cache
from alignment.models.kernels.kv_cache import RowsCache

DROPPED = 32
"""Columns that are dropped at once, because what follows them is moved."""


@dataclass(kw_only=True, slots=True)
class DecodingRows:
    """The rows of a batch between two steps.

    ``numbers`` are the prompts that the rows answer. ``filled`` columns of the cache have been computed; ``prefix``
    ones come first, and row i sees these and those from ``starts[i]`` on, which ``seen [rows, columns]`` marks with 1.
    Before all of that it sees the ``beginning``. ``positions [rows, 1]`` are those of the last column. ``logits [rows,
    vocabulary]`` are those of the next token, and ``uniforms [rows, steps]`` choose it, at ``steps [rows, 1]``; without
    them the likeliest token is taken.
    """

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
        """Has prompts take over ``rows`` beside the ``unfinished`` ones.

        No prompt may be longer than one that entered before.
        """
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
    """``[prompts, 1]``: the position of the last token of each prompt, which has so many tokens ahead of it."""
    return on_device(torch.tensor([[ahead + len(prompt) - 1] for prompt in prompts]), device)
