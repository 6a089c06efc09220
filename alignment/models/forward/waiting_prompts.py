"""Prompts that wait for a row in a decoding batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from alignment.models.forward.shared_prompts import Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrants:
    """Prompts in ``reading_order`` with their numbers, and ``uniforms [prompts, steps]`` unless the likeliest token is
    taken.

    ``reading`` holds what the model computed for them, if it has.
    """

    numbers: Sequence[int]
    prompts: Sequence[Sequence[int]]
    uniforms: Tensor | None
    reading: Reading | None = None


@dataclass(kw_only=True, slots=True)
class WaitingPrompts:
    """Prompts in ``reading_order``, of which the first ``begun`` have been read.

    ``uniforms`` gives the random numbers of some prompts, ``[prompts, steps]``. ``reading`` is of all prompts.
    """

    prompts: Sequence[Sequence[int]]
    uniforms: Callable[[slice], Tensor] | None
    reading: Reading | None = None
    begun: int = 0

    @property
    def waiting(self) -> int:
        """How many prompts have not been read."""
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
