"""What happens around a trainer's steps: metrics and progress, checkpoints that are sealed, stopping on request, and
refusing to step on numbers that are not finite."""

from __future__ import annotations

import math
import signal
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.errors import ConfigError, NonFiniteError
from alignment.models.adapters import with_own
from alignment.training import checkpoints
from alignment.training.context import StageContext
from alignment.training.metrics import MetricsLog
from alignment.training.sharding import everyones, layout

_NAMES = {"learning_rate": "lr"}


class StepLog(TrainerCallback):
    """Writes each logged step to ``metrics.jsonl``, the trackers and the progress line (main process only)."""

    def __init__(self, context: StageContext, log: MetricsLog, *, headline: str) -> None:
        self._context = context
        self._log = log
        self._headline = headline

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Shows the length of the work before the first step is done."""
        self._context.progress("training", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last step is always logged, however rarely the others are: the stage's figures are taken from it."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One line a step; the trainer's closing summary is not one."""
        if not self._context.is_main or not logs or "train_runtime" in logs:
            return
        figures = {_NAMES.get(name, name): value for name, value in logs.items()}
        figures["seconds"] = self._context.clock.seconds()
        self._log.append(state.global_step, figures)
        self._context.trackers.log(state.global_step, figures)
        shown = {self._headline: figures[self._headline]} if self._headline in figures else {}
        self._context.progress("training", state.global_step, state.max_steps, **shown)


class Checkpoints(TrainerCallback):
    """Seals each checkpoint once every process has written its part, then removes the oldest."""

    def __init__(self, context: StageContext) -> None:
        self._context = context

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Runs on every process right after the trainer has saved."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self._context.is_main:
            folder = self._context.checkpoints / f"checkpoint-{state.global_step}"
            checkpoints.seal(folder, fingerprint=self._context.spec.fingerprint, layout=layout(self._context))
            checkpoints.rotate(self._context.checkpoints)


class FiniteGradients(TrainerCallback):
    """Stops before anything is kept of a step on NaN or infinity; the last good checkpoint stays."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Gradients are already summed over processes here, so all of them see the same fault."""
        engine = getattr(self._trainer, "deepspeed", None)
        # DeepSpeed has taken the step by now, and keeps of its gradients the norm alone.
        fault = _first_fault(model) if engine is None else _fault_of_norm(engine.get_global_grad_norm())
        if fault is not None:
            raise NonFiniteError(
                f"a gradient is not finite at step {state.global_step + 1}{fault}",
                remedy="lower the learning rate, or look at the rows of this step; the last checkpoint is kept",
            )


def _fault_of_norm(norm: float | None) -> str | None:
    return "" if norm is not None and not math.isfinite(norm) else None


def _first_fault(model: Any) -> str | None:
    """Where a gradient is not finite, in brackets; of shares, all processes say so if one finds it in its own."""
    grads = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    shared_out = any(isinstance(grad, DTensor) for _, grad in grads)
    own = ((name, grad.to_local() if isinstance(grad, DTensor) else grad) for name, grad in grads)
    fault = next((f" ({name})" for name, grad in own if not bool(grad.isfinite().all())), None)
    if not shared_out:
        return fault
    return next((found for found in everyones(fault) if found is not None), None)


class WarmupEnds(TrainerCallback):
    """Refuses a stage so short that the rate never leaves its warm-up, which begins at 0: it would learn nothing."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Runs once the number of steps is known."""
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            raise ConfigError(
                f"the warm-up takes all of the stage's {state.max_steps} optimiser steps, so nothing would be learned",
                where="optim.warmup_ratio",
                remedy="set it to 0, or take smaller batches, more rows or more epochs",
            )


class AdaptersAtWork(TrainerCallback):
    """Switches on again what the trainer switched off: reloading a checkpoint, it leaves one adapter active, without
    those that it stands on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Runs after a checkpoint was loaded."""
        if isinstance(model, PeftModel):
            with_own(model)


class NothingLeft(Exception):
    """All steps were done before; the checkpoint is loaded."""


class NoStepTooMany(TrainerCallback):
    """Ends a training that was resumed after its last step; with ``max_steps`` transformers would take one more."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Runs before anything of the step does."""
        if state.global_step >= state.max_steps:
            raise NothingLeft


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGUSR1 save a checkpoint and stop; ``stopped`` then says so.

    It stops where a checkpoint is exact: after every ``period`` steps (the steps of a PPO update, else 1).
    """

    def __init__(self, *, period: int) -> None:
        self.stopped = False
        self._period = period
        self._asked = False
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._ask)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every process stops at the same step, also when only one was asked."""
        if state.global_step % self._period:
            return
        asked = self._asked
        if torch.distributed.is_initialized():
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        ends_anyway = control.should_training_stop or state.global_step >= state.max_steps
        if asked and not ends_anyway:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
