"""The exact loss of a model on held-out rows, computed by all processes of a stage.

The evaluation of transformers' ``Trainer`` is not used. Its mean counts each batch by its rows, not by its learned
tokens; it repeats rows to fill the last batch; and its data loader draws from the random numbers that dropout uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from datasets import Dataset

from alignment.models.forward.rows import by_tokens
from alignment.records.training import ACCURACY, LOSS
from alignment.training.micro_batches import MicroBatches, outside_of_data_loaders
from alignment.training.sharding import everyones


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutRows:
    """Rows as the trainer's collator takes them, and ``[rows]`` tokens of each, by which micro-batches are limited."""

    rows: Dataset
    tokens: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """The rows that a process computes in a micro-batch while each other process computes as many.

    ``by_all``: all processes compute the same rows.
    """

    rows: Sequence[int]
    by_all: bool


def rounds(tokens: Sequence[int], *, limit: int, rank: int, world_size: int) -> Iterator[Round]:
    """Divides rows of so many tokens among processes, into micro-batches of at most ``limit`` tokens on each.

    All processes have as many micro-batches, with as many rows, because each is a collective call in TRL's trainers.
    Rows that cannot be divided evenly are computed by all processes. Example: of five rows, rank 0 of 2 computes rows 0
    and 2, rank 1 computes rows 1 and 3, then both compute row 4.
    """
    even = len(tokens) // world_size * world_size
    largest = [max(tokens[first : first + world_size]) for first in range(0, even, world_size)]
    for span in by_tokens(largest, limit):
        yield Round(rows=[group * world_size + rank for group in span], by_all=False)
    for span in by_tokens(tokens[even:], limit):
        yield Round(rows=[even + row for row in span], by_all=True)


@torch.no_grad()
def held_out_metrics(trainer: MicroBatches, held_out: HeldOutRows) -> dict[str, float]:
    """The held-out loss and accuracy of the trainer's model, the same on every process, which must all call this.

    Both are means over all pairs, or over all learned tokens. There is no dropout, and no random number is drawn.
    """
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    loss = accuracy = count = 0.0
    with _in_evaluation_mode(model), outside_of_data_loaders(accelerator):
        for part in rounds(
            held_out.tokens,
            limit=trainer.micro_batch_tokens,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ):
            batch = trainer.data_collator([held_out.rows[row] for row in part.rows])
            loss_of_part, accuracy_of_part, items = trainer.held_out_loss(model, batch)
            items /= accelerator.num_processes if part.by_all else 1
            loss += loss_of_part * items
            accuracy += accuracy_of_part * items
            count += items
    trainer._metrics["eval"].clear()  # TRL would report unweighted means of them
    losses = everyones(loss)
    return {LOSS: sum(losses) / len(losses) / count, ACCURACY: accuracy / count}


@contextmanager
def _in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
