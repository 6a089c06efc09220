"""Trials of the sizes of micro-batches on the rows of one of TRL's trainers."""

from __future__ import annotations

import numpy as np

from alignment.training.longest_batch import counted_tokens, is_flat, largest
from alignment.training.micro_batches import MicroBatches


class RowTrials:
    """``Trials`` (size_search.py) of a trainer whose optimiser is ready and whose models may be spoiled."""

    def __init__(self, trainer: MicroBatches) -> None:
        self._trainer = trainer
        self._tokens = counted_tokens(trainer)
        self._most = trainer.args.per_device_train_batch_size

    def bounds(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the longest rows that a process's share of a batch can have."""
        return int(self._tokens.max()), int(np.sort(self._tokens)[-self._most :].sum())

    def least_step(self) -> int:
        """Takes a step on the shortest row; returns its tokens."""
        return self._step([int(self._tokens.argmin())], limit=1)

    def step(self, limit: int) -> int:
        """Takes a step on the largest micro-batch of at most ``limit`` tokens; returns its tokens."""
        rows = largest(self._tokens, limit=limit, most=self._most, padded=not is_flat(self._trainer))
        return self._step(rows, limit=limit)

    def _step(self, rows: list[int], *, limit: int) -> int:
        self._trainer.micro_batch_tokens = limit
        self._trainer.learn_rows(rows)
        return int(self._tokens[rows].sum())
