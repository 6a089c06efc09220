"""Tries sizes of micro-batches before a stage's first step and chooses one that fits (docs/design/0044). Each size is
tried by an optimiser step on the largest micro-batch that the rows can make. These steps spoil weights, optimiser and
random numbers. So the models are thrown away afterwards, and the stage begins anew with the number."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.core import hardware
from alignment.core.errors import StageError
from alignment.records.training import TriedSize
from alignment.training.context import PhasePeaks
from alignment.training.longest_batch import is_out_of_memory
from alignment.training.sharding import everyones

SAFE_SHARE = 0.9
"""Of the memory that a process can have; the rest is for other phases and for fragments."""
FASTER = 1.05
"""How many times as many tokens a second a larger size must compute on a CPU."""
PHASE = "choosing the size of micro-batches"


class Trials(Protocol):
    """What a search asks of a trainer whose models may be spoiled. A step is forward, backward and the optimiser's."""

    def bounds(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the largest micro-batch that a process can have."""

    def least_step(self) -> int:
        """Takes a step on the shortest row; returns its tokens."""

    def step(self, limit: int) -> int:
        """Takes a step on the largest micro-batch of at most ``limit`` tokens, or the longest row; returns its
        tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The chosen number of ``tokens``, and what was tried."""

    tokens: int
    tried: tuple[TriedSize, ...]


class SizeChosen(BaseException):
    """Ends a stage whose models were only there for the trials. ``except Exception`` in the stage does not catch it."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeSearch:
    """A search on ``device``; ``memory`` says how many bytes of its memory this process can have. ``where`` names the
    stage's optimiser in errors."""

    device: torch.device
    memory: Callable[[torch.device], float]
    where: str

    def run(self, trainer: Trainer, trials: Trials) -> NoReturn:
        """Tries sizes where the training would begin. Raises SizeChosen: the outcome. Raises StageError: not even the
        longest row fits."""
        trainer.add_callback(_AtBegin(lambda: self.choice(trials)))
        trainer.train()
        raise AssertionError("the callback ends it")

    def choice(self, trials: Trials) -> Choice:
        """The largest size that fits; on a CPU, the last that is faster than the one before. The same on every process.
        Raises StageError: not even the longest row fits."""
        longest, largest = trials.bounds()
        memory = SAFE_SHARE * self.memory(self.device)
        outcomes = [self._outcome(trials.least_step)]
        tried: list[TriedSize] = []
        for limit in sizes(longest, largest):
            if tried and not self._may_fit(outcomes, limit, memory):
                break
            outcomes.append(self._outcome(partial(trials.step, limit)))
            tried.append(_agreed(limit, outcomes[-1], memory))
            if not tried[-1].fits or self._is_no_faster(tried):
                break
        fitting = [size for size in tried if size.fits]
        if not fitting:
            raise StageError(
                f"auto found no size: not even the longest row, of {longest} tokens, fits into {SAFE_SHARE:.0%} of the "
                "memory",
                where=f"{self.where}.micro_batch_tokens",
                remedy=f"set {self.where}.activation_checkpointing=true, lower the stage's limit of tokens per row, "
                f"or train an adapter",
            )
        return Choice(tokens=fitting[-2 if self._is_no_faster(fitting) else -1].limit, tried=tuple(tried))

    def _may_fit(self, outcomes: Sequence[Outcome | None], limit: int, memory: float) -> bool:
        """Whether a size is worth a trial, on the memory of those before. One process on a GPU tries each: there a lack
        of memory is an error that ends the search."""
        if self.device.type == "cuda" and not torch.distributed.is_initialized():
            return True
        return all(everyones(expected(outcomes, limit) <= memory))

    def _is_no_faster(self, tried: Sequence[TriedSize]) -> bool:
        if self.device.type != "cpu" or len(tried) < 2:
            return False
        before, last = (size.tokens / size.seconds for size in tried[-2:])
        return last < FASTER * before

    def _outcome(self, step: Callable[[], int]) -> Outcome | None:
        """What a step took, or None if there was not enough memory. On a CPU the second of two is timed, because the
        first one takes memory from the system."""
        peaks = PhasePeaks()
        try:
            for _ in range(2 if self.device.type == "cpu" else 1):
                started = time.monotonic()
                peaks.begin(PHASE)
                tokens = step()
                peaks.end()
                seconds = time.monotonic() - started
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        peak = (peaks.allocated if self.device.type == "cuda" else peaks.resident).get(PHASE, 0.0)
        return Outcome(tokens=tokens, bytes=peak, seconds=seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A step on so many ``tokens``: the highest ``bytes`` of this process meanwhile, or of its GPU, and ``seconds``."""

    tokens: int = 0
    bytes: float = 0.0
    seconds: float = 0.0


def sizes(longest: int, largest: int) -> Iterator[int]:
    """The sizes to try: doubled from the longest row, up to the largest micro-batch. Example: 3, 10 gives 3 6 10."""
    size = longest
    while size < largest:
        yield size
        size *= 2
    yield max(longest, largest)


def expected(outcomes: Sequence[Outcome | None], tokens: int) -> float:
    """Bytes that so many tokens will take, on the line through the last two different outcomes. The line goes through 0
    if all are alike. The last outcome is there."""
    points = [outcome for outcome in outcomes if outcome is not None]
    last = points[-1]
    before = next((point for point in reversed(points) if point.tokens < last.tokens), Outcome())
    slope = (last.bytes - before.bytes) / (last.tokens - before.tokens)
    return last.bytes + max(0.0, slope) * (tokens - last.tokens)


def _agreed(limit: int, own: Outcome | None, memory: float) -> TriedSize:
    """What all processes say of a size: it fits if it fits on each, and takes what it takes on the slowest."""
    outcomes = everyones((own, own is not None and own.bytes <= memory))
    done = [outcome for outcome, _ in outcomes if outcome is not None]
    return TriedSize(
        limit=limit,
        tokens=max((outcome.tokens for outcome in done), default=0),
        bytes=max((outcome.bytes for outcome in done), default=0.0),
        seconds=max((outcome.seconds for outcome in done), default=0.0),
        fits=all(fits for _, fits in outcomes),
    )


def attainable(device: torch.device) -> float:
    """Bytes of a device's memory that this process has or can have; of a machine's, its share of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.Process().memory_info().rss + hardware.free_memory() / sharing


class _AtBegin(TrainerCallback):
    def __init__(self, choose: Callable[[], Choice]) -> None:
        self._choose = choose

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        raise SizeChosen(self._choose())
