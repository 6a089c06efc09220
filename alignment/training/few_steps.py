"""Ends a training that runs on shadows after the steps that tell what it costs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.costs.recorder import ACTIVATIONS, OPTIMIZER, Recorder
from alignment.training.micro_batches import MicroBatches, Unit
from alignment.training.row_lengths import row_tokens


class FewSteps(TrainerCallback):
    """Stops after two periods of ``period`` steps; in the second one the optimiser has its moments already."""

    def __init__(self, recorder: Recorder, trainer: Trainer, *, period: int) -> None:
        self._recorder = recorder
        self._trainer = trainer
        self._period = period
        self._tokens = 0.0
        self._before = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Runs once the number of steps is known."""
        assert isinstance(model, nn.Module)
        self._recorder.begin_steps(state.max_steps, model, period=self._period)
        if isinstance(self._trainer, MicroBatches):
            tokens = row_tokens(self._trainer.train_dataset, prompts_twice=self._trainer.unit is Unit.pairs)
            self._recorder.mean_tokens = float(tokens.mean()) * args.per_device_train_batch_size

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What the optimiser takes in its first step are its moments."""
        self._before = self._recorder.name
        self._recorder.phase("optimising")
        self._recorder.memory.label = OPTIMIZER

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Runs after the optimiser's step."""
        self._recorder.memory.label = ACTIVATIONS
        self._recorder.phase(self._before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes no checkpoint."""
        control.should_save = False
        if state.global_step % self._period:
            return
        tokens = float(state.num_input_tokens_seen)
        self._recorder.end_period(tokens - self._tokens)
        self._tokens = tokens
        if state.global_step >= 2 * self._period:
            control.should_training_stop = control.should_log = True
