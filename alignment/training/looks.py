"""Looks at held-out rows while a trainer trains: keeps the best weights, and ends a training that no longer improves.

The step with the least held-out loss is handed on, or the last one. The rows that choose a step flatter it, so its
held-out loss is optimistic. Everything that a resumed stage needs is in the checkpoint, which is sealed with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.config.data import ValidationConfig
from alignment.core.errors import ConfigError
from alignment.costs.recorder import on_shadows, recorder
from alignment.records import training as names
from alignment.training.best_weights import BestWeights
from alignment.training.callbacks import NothingLeft
from alignment.training.context import StageContext
from alignment.training.held_out import HeldOutRows, held_out_metrics
from alignment.training.micro_batches import MicroBatches
from alignment.training.row_lengths import refuse_long_rows

STATE, BEST = "validation.json", "validation_best.safetensors"
"""Files in a checkpoint: the looks so far, and the weights of the best one."""


@dataclass(kw_only=True, slots=True)
class Looks:
    """What the looks so far have shown. ``since_best`` counts the looks after that of the least loss, ``best_loss``.

    The loss of a look that was not below ``best_loss`` is no improvement.
    """

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
    """Judges the model after every ``every`` steps and after the last, on every process alike.

    Raises:
        ModelError: a held-out row is longer than the model's positions.
    """

    def __init__(
        self, config: ValidationConfig, context: StageContext, trainer: MicroBatches, held_out: HeldOutRows
    ) -> None:
        self._config = config
        self._context = context
        self._trainer = trainer
        self._held_out = held_out
        refuse_long_rows(trainer.model, held_out.rows, lambda row: f"row {row + 1} of the held-out rows")
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
        self._metrics = held_out_metrics(self._trainer, self._held_out)
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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
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
        """Puts the weights of ``handed_on`` into the model; returns what a manifest says of the looks.

        Every process must call this. The figures of the step itself are in its line of metrics.jsonl.
        """
        if self.handed_on != self.looks.last_step:
            self._best.restore()
        return {
            names.LOSS: self.looks.best_loss if self._config.keep_best else self.looks.last_loss,
            names.STEP: float(self.handed_on),
            names.LAST_STEP: float(self.looks.last_step),
            names.LAST_LOSS: self.looks.last_loss,
            names.PLANNED_STEPS: float(self._trainer.state.max_steps),
            names.ROWS: float(len(self._held_out.tokens)),
        }


def of_handed_on(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of validation among the metrics that ``train`` returns; empty without validation."""
    return {name: value for name, value in metrics.items() if name.startswith(names.PREFIX)}
