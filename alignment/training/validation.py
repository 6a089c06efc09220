"""Validation while a stage trains: on held-out rows, the best weights so far, and patience."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.config.data import ValidationConfig
from alignment.core.errors import ConfigError
from alignment.costs.recorder import on_shadows, recorder
from alignment.models.forward.rows import by_tokens
from alignment.records import training as names
from alignment.records.training import ACCURACY, LOSS
from alignment.training.callbacks import NothingLeft
from alignment.training.context import StageContext
from alignment.training.longest_batch import refuse_long_rows
from alignment.training.micro_batches import MicroBatches, outside_of_data_loaders
from alignment.training.sharding import everyones, put, whole_state


class BestWeights:
    """Copies of a model's trained weights. ``file`` is their name in a checkpoint's folder. The main process holds one
    copy of all trained weights in its memory, whole; the other processes hold none."""

    def __init__(self, model: nn.Module, *, file: str) -> None:
        self._model = model
        self._file = file
        self._weights: dict[str, Tensor] = {}

    def record(self) -> None:
        """Copies the weights as they are now; every process must call this."""
        named = dict(self._model.named_parameters())  # holds a tied weight once, so that it is written once
        weights = whole_state(self._model, trained_only=True)
        self._weights = {name: held for name, held in weights.items() if name in named}

    def restore(self) -> None:
        """Puts the recorded weights into the model; every process must call this."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                put(parameter, self._weights.get(name))

    def save(self, folder: Path) -> None:
        """Writes them into a checkpoint that is not sealed yet; only the main process has any to write."""
        if self._weights:
            save_file({name: held.contiguous() for name, held in self._weights.items()}, folder / self._file)

    def load(self, folder: Path, *, main: bool) -> None:
        """Reads what ``save`` wrote; ``main`` says whether this is the main process."""
        self._weights = load_file(folder / self._file) if main else {}


def rounds(tokens: Sequence[int], *, limit: int, rank: int, world_size: int) -> Iterator[tuple[list[int], bool]]:
    """Divides rows of so many tokens among processes, into micro-batches of at most ``limit`` tokens on each. Gives
    the rows that this process computes while each other one computes as many, and whether these are the same rows. All
    processes have as many micro-batches, with as many rows, because each is a collective call in TRL's trainers. Rows
    that cannot be divided evenly are computed by all processes. Example: of five rows, rank 0 of 2 computes rows 0 and
    2, rank 1 computes rows 1 and 3, then both compute row 4."""
    even = len(tokens) // world_size * world_size
    largest = [max(tokens[first : first + world_size]) for first in range(0, even, world_size)]
    for span in by_tokens(largest, limit):
        yield [group * world_size + rank for group in span], False
    for span in by_tokens(tokens[even:], limit):
        yield [even + row for row in span], True


@torch.no_grad()
def held_out_metrics(trainer: MicroBatches, rows: Dataset, tokens: Sequence[int]) -> dict[str, float]:
    """The held-out loss and accuracy of the trainer's model, the same on every process, which must all call this. Both
    are means over all pairs, or over all learned tokens. There is no dropout, and no random number is drawn."""
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    loss = accuracy = count = 0.0
    with _in_evaluation_mode(model), outside_of_data_loaders(accelerator):
        for part, by_all in rounds(
            tokens,
            limit=trainer.micro_batch_tokens,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ):
            batch = trainer.data_collator([rows[row] for row in part])
            loss_of_part, accuracy_of_part, items = trainer.held_out_loss(model, batch)
            items /= accelerator.num_processes if by_all else 1
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


STATE, BEST = "validation.json", "validation_best.safetensors"
"""Files in a checkpoint: the looks so far, and the weights of the best one."""


@dataclass(kw_only=True, slots=True)
class Looks:
    """What the looks so far have shown. ``since_best`` counts the looks after that of the least loss, ``best_loss``.
    The loss of a look that was not below ``best_loss`` is no improvement."""

    best_step: int = 0
    best_loss: float = math.inf
    since_best: int = 0
    last_step: int = 0
    last_loss: float = math.inf
    out_of_patience: bool = False

    def add(self, step: int, loss: float, *, patience: int | None) -> bool:
        """Records a look; returns whether it is the best so far."""
        self.last_step, self.last_loss = step, loss
        improved = loss < self.best_loss
        if improved:
            self.best_step, self.best_loss, self.since_best = step, loss, 0
        else:
            self.since_best += 1
        self.out_of_patience = patience is not None and self.since_best >= patience
        return improved


class Validation(TrainerCallback):
    """Judges the model after every ``every`` steps and after the last, on every process alike. Raises ModelError: a
    held-out row is longer than the model's positions. ``rows`` are as the trainer's collator takes them, and have
    ``[rows]`` ``tokens``, by which micro-batches are limited."""

    def __init__(
        self,
        config: ValidationConfig,
        context: StageContext,
        trainer: MicroBatches,
        rows: Dataset,
        tokens: Sequence[int],
    ) -> None:
        self._config = config
        self._context = context
        self._trainer = trainer
        self._rows, self._tokens = rows, tokens
        refuse_long_rows(trainer.model, rows, lambda row: f"row {row + 1} of the held-out rows")
        self._best = BestWeights(trainer.model, file=BEST)
        self._metrics: dict[str, float] = {}
        self.looks = Looks()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuses looks that would never come, once the number of steps is known."""
        if self._config.every > state.max_steps and not on_shadows():  # which read few rows
            raise ConfigError(
                f"{self._config.every} is more than the {state.max_steps} optimiser steps of the stage",
                where=f"stages.{self._context.spec.stage}.validation.every",
                remedy=f"choose at most {state.max_steps}",
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint of the step at which the patience ended is the end."""
        if self.looks.out_of_patience:
            raise NothingLeft

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Looks if a look is due; the step is then logged with the figures of the look, whatever ``log_every`` says."""
        if not self._is_due(state, control):
            return
        self._context.progress("validating", state.global_step, state.max_steps)
        self._metrics = held_out_metrics(self._trainer, self._rows, self._tokens)
        self._context.progress("training", state.global_step, state.max_steps)
        improved = self.looks.add(state.global_step, self._metrics[names.LOSS], patience=self._config.patience)
        if improved and self._config.keep_best:
            self._best.record()
        control.should_log = True
        if self.looks.out_of_patience:
            control.should_save = control.should_training_stop = True  # as after the last step

    def _is_due(self, state: TrainerState, control: TrainerControl) -> bool:
        if (estimate := recorder()) is not None:  # which ends early, and needs one look to know what they cost
            due = bool(control.should_training_stop)
            estimate.look_every = self._config.every
            estimate.looks_taken += due
            return due
        return state.global_step % self._config.every == 0 or state.global_step == state.max_steps

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Adds the figures to the line of the step, so that there is one line a step."""
        if logs is not None and "loss" in logs and self.looks.last_step == state.global_step:
            logs.update(self._metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes into the checkpoint, before it is sealed."""
        if self._context.is_main:
            folder = self._context.checkpoints / f"checkpoint-{state.global_step}"
            (folder / STATE).write_text(json.dumps(asdict(self.looks)), encoding="utf-8")
            self._best.save(folder)

    def resume(self, checkpoint: Path) -> None:
        """Continues from what ``on_save`` wrote."""
        self.looks = Looks(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
        if self._config.keep_best and self.looks.best_step:
            self._best.load(checkpoint, main=self._context.is_main)

    @property
    def handed_on(self) -> int:
        """The step whose weights are handed on."""
        return self.looks.best_step if self._config.keep_best else self.looks.last_step

    def finish(self) -> dict[str, float]:
        """Puts the weights of ``handed_on`` into the model; returns what a manifest says of the looks. Every process
        must call this. The figures of the step itself are in its line of metrics.jsonl."""
        if self.handed_on != self.looks.last_step:
            self._best.restore()
        return {
            names.LOSS: self.looks.best_loss if self._config.keep_best else self.looks.last_loss,
            names.STEP: float(self.handed_on),
            names.LAST_STEP: float(self.looks.last_step),
            names.LAST_LOSS: self.looks.last_loss,
            names.PLANNED_STEPS: float(self._trainer.state.max_steps),
            names.ROWS: float(len(self._tokens)),
        }


def of_handed_on(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of validation among the metrics that ``train`` returns; empty without validation."""
    return {name: value for name, value in metrics.items() if name.startswith(names.PREFIX)}
