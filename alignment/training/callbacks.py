"""Callbacks around a trainer's steps: metrics and progress, sealed checkpoints, and stopping on request."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.core.child_processes import SIGNALS
from alignment.core.errors import ConfigError, StageError
from alignment.models.assembly.adapters import with_own
from alignment.records.training import MetricsLog
from alignment.training import checkpoints
from alignment.training.context import StageContext
from alignment.training.finite import refuse_metrics, refuse_weights
from alignment.training.sharding import is_sharded, layout

_NAMES = {"learning_rate": "lr"}


class StepLog(TrainerCallback):
    """Writes each logged step to ``metrics.jsonl``, the trackers and the progress line (main process only). Every
    ``period`` steps of the trainer count as one step there (those of a PPO update, else 1)."""

    def __init__(self, context: StageContext, log: MetricsLog, *, headline: str, period: int) -> None:
        self._context = context
        self._log = log
        self._headline = headline
        self._period = period

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reports the number of steps before the first one is done."""
        self._context.progress("training", self._counted(state.global_step), self._counted(state.max_steps))

    def _counted(self, trainer_steps: int) -> int:
        """An update over PPO's KL budget ends after its first step, and counts."""
        return math.ceil(trainer_steps / self._period)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Always logs the last step, because the stage's metrics come from it."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Writes one line per step, but not the trainer's final summary. A non-finite metric ends the stage after it is
        written and before a checkpoint is saved."""
        if not logs or "train_runtime" in logs:
            return
        if self._context.is_main:
            self._write(state, logs)
        refuse_metrics(logs, step=self._counted(state.global_step))

    def _write(self, state: TrainerState, logs: dict[str, Any]) -> None:
        step = self._counted(state.global_step)
        metrics = {_NAMES.get(name, name): value for name, value in logs.items()}
        metrics["seconds"] = self._context.clock.seconds()
        self._log.append(step, metrics)
        self._context.trackers.log(step, metrics)
        headline = {self._headline: metrics[self._headline]} if self._headline in metrics else {}
        self._context.progress("training", step, self._counted(state.max_steps), **headline)


class Checkpoints(TrainerCallback):
    """Seals each checkpoint once every process has written its part, then removes the oldest. A checkpoint with a
    non-finite weight is never sealed, so no later attempt continues from it."""

    def __init__(self, context: StageContext) -> None:
        self._context = context

    def on_save(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        refuse_weights((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
        if self._context.is_main:
            folder = self._context.checkpoints / f"checkpoint-{state.global_step}"
            checkpoints.seal(folder, fingerprint=self._context.spec.fingerprint, layout=layout(self._context))
            checkpoints.rotate(self._context.checkpoints)


class NothingLeft(Exception):
    """All steps were done by an earlier attempt; the checkpoint is loaded."""


class WellBegun(TrainerCallback):
    """Begins a training, perhaps from a checkpoint. It logs and saves as often as the settings say now, not as
    they said when the checkpoint was written, and activates the adapters below the own one again, of which the trainer
    leaves only one active. A warm-up that covers the whole stage is refused: it begins at 0 and would teach nothing. A
    training that is resumed after its last step ends; with ``max_steps`` transformers would take one more."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)
        if isinstance(model, PeftModel):
            with_own(model)
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            raise ConfigError(
                f"the warm-up covers all {state.max_steps} optimiser steps of the stage, so nothing would be learned",
                where="optim.warmup_ratio",
                remedy="set it to 0, or use smaller batches, more rows or more epochs",
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise NothingLeft


class WeightsAreSharded(TrainerCallback):
    """Refuses a launch that should shard weights, and whose trainer did not."""

    def __init__(self, context: StageContext) -> None:
        self._sharding = context.spec.sharding

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._sharding.of_weights and not is_sharded(model):
            raise StageError(
                f"each process has the whole weights, although the launch should shard them ({self._sharding.value})",
                where="launch.sharding",
                remedy="use a different launch, and report this with the versions of accelerate and torch",
            )


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops the training when a signal asks for it; ``stopped`` is True then. It stops where a
    checkpoint is exact: after every ``period`` steps (the steps of a PPO update, else 1)."""

    def __init__(self, *, period: int) -> None:
        self.stopped = False
        self.asked = False
        self._period = period

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, a signal asks to stop at the next exact step; the old handlers are restored
        afterwards."""
        # Outside a worker, Ctrl-C still raises KeyboardInterrupt.
        chosen = [number for number in SIGNALS if signal.getsignal(number) is not signal.default_int_handler]
        before = {number: signal.signal(number, self._ask) for number in chosen}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops all processes at the same step, even if only one received the signal."""
        if state.global_step % self._period:
            return
        asked = self.asked
        if torch.distributed.is_initialized():
            flag = torch.full((), int(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        ends_anyway = control.should_training_stop or state.global_step >= state.max_steps
        if asked and not ends_anyway:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
