"""Runs a trainer from the newest good checkpoint to its end, with callbacks, and measures its usage."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.core.errors import ConfigError
from alignment.costs.recorder import ACTIVATIONS, OPTIMIZER, Recorder, on_shadows, recorder
from alignment.records.training import METRICS, USAGE, MetricsLog
from alignment.training import checkpoints
from alignment.training.callbacks import Checkpoints, NothingLeft, StepLog, StopOnSignal, WeightsAreSharded, WellBegun
from alignment.training.context import StageContext
from alignment.training.finite import FiniteSteps, refuse_divergence
from alignment.training.longest_batch import LongestBatch, RowTrials, refuse_long_rows, row_tokens
from alignment.training.micro_batches import MicroBatches, Unit
from alignment.training.sharding import cut_by_module, everyones, layout
from alignment.training.size_search import PHASE, SizeSearch, Trials
from alignment.training.validation import Validation


class FewSteps(TrainerCallback):
    """Stops after two periods of ``period`` steps; in the second one the optimiser has its moments already."""

    def __init__(self, recorder: Recorder, trainer: Trainer, *, period: int) -> None:
        self._recorder = recorder
        self._trainer = trainer
        self._period = period
        self._tokens = 0.0
        self._before = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        assert isinstance(model, nn.Module)
        self._recorder.begin_steps(state.max_steps, model, period=self._period)
        if isinstance(self._trainer, MicroBatches):
            tokens = row_tokens(self._trainer.train_dataset, prompts_twice=self._trainer.unit is Unit.pairs)
            self._recorder.mean_tokens = float(tokens.mean()) * args.per_device_train_batch_size

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the optimiser takes in its first step are its moments."""
        self._before = self._recorder.name
        self._recorder.phase("optimising")
        self._recorder.memory.label = OPTIMIZER

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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


PEAK, GPU_PEAK, ENGINE_PEAK = "peak_rss_bytes", "peak_gpu_bytes", "peak_engine_bytes"
"""Keys of ``usage``; those of a phase go on with ``/`` and its name."""


class Preempted(BaseException):
    """The stage was asked to stop, saved a checkpoint and stopped. A signal may raise it anywhere in the stage; as a
    BaseException it is not mistaken for a fault by ``except Exception``. Outside of training nothing is ``saved``, and
    the next attempt continues from the earlier checkpoint. ``trained`` says that the request came during the last step,
    which ends the training in any case."""

    def __init__(self, *, saved: bool = True, trained: bool = False) -> None:
        super().__init__()
        self.saved = saved
        self.trained = trained


def train(
    trainer: Trainer,
    context: StageContext,
    *,
    headline: str,
    period: int = 1,
    ceiling: float = math.inf,
    validation: Validation | None = None,
    trials: Trials | None = None,
) -> dict[str, float]:
    """Trains, resuming where an earlier attempt stopped; returns the metrics of the last step, which is always logged.
    ``headline`` names the metric beside the progress bar. Every ``period`` steps of the trainer, such as those of a PPO
    update, are one step of metrics and progress, and checkpoints are exact between them. A loss that rises above
    ``ceiling`` counts as divergence. With ``validation``, the model holds the weights of the step that it hands on, the
    metrics are those of that step, and later losses are not judged. Where a size of micro-batches is sought, ``trials``
    are taken in place of the training; a trainer of rows has its own. Raises SizeChosen: a size was sought. Raises
    Preempted: a signal asked to stop; the checkpoint is written. Raises NonFiniteError: a loss or gradient was not
    finite. Raises StageError: the training diverged. Raises ModelError: a row is longer than the model's positions."""
    if isinstance(trainer, MicroBatches):
        refuse_long_rows(trainer.model, trainer.train_dataset, trainer.row_origin)
    if context.search is not None:
        _seek_size(context.search, trainer, context, trials)
    resumed = _newest_checkpoint(context)
    log = _log_up_to(resumed, context, period)
    stop = StopOnSignal(period=period)
    steps = StepLog(context, log, headline=headline, period=period)
    looks = () if validation is None else (validation,)  # first: it adds to what others log, seal and stop
    if (estimate := recorder()) is not None:  # before others that take a step
        trainer.add_callback(FewSteps(estimate, trainer, period=period))
    longest = (LongestBatch(trainer, context),) if isinstance(trainer, MicroBatches) else ()
    checks = (WeightsAreSharded(context), WellBegun(), FiniteSteps(trainer))
    for callback in (*looks, steps, Checkpoints(context), *checks, *longest, stop):
        trainer.add_callback(callback)
    if validation is not None and resumed is not None:
        validation.resume(resumed)
    # NothingLeft: an earlier attempt did every step; the checkpoint is loaded.
    with stop.listening(), contextlib.suppress(NothingLeft), cut_by_module(trainer.model, context):
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if stop.stopped:
        raise Preempted
    if stop.asked:  # after the last step there was none left to stop at
        raise Preempted(saved=False, trained=True)
    return _metrics_of(log, context, validation=validation, ceiling=ceiling)


def _metrics_of(
    log: MetricsLog, context: StageContext, *, validation: Validation | None, ceiling: float
) -> dict[str, float]:
    """The metrics of the last step, or of the one that validation hands on, whose weights are put back. Raises
    StageError: the training diverged."""
    rows = everyones(log.rows() if context.is_main else [])[0]  # only the main process has written them
    outcome: dict[str, float] = {}
    if validation is not None:
        rows, outcome = [row for row in rows if row["step"] <= validation.handed_on], validation.finish()
    if not on_shadows():
        refuse_divergence([row["loss"] for row in rows if "loss" in row], ceiling=ceiling)
    if context.is_main:
        context.trackers.table("samples", MetricsLog(context.content / "samples.jsonl").rows())
    last = {key: value for key, value in (rows[-1] if rows else {}).items() if isinstance(value, (int, float))}
    return last | outcome


def _seek_size(search: SizeSearch, trainer: Trainer, context: StageContext, trials: Trials | None) -> NoReturn:
    """Takes trials of sizes on the weights as the training would have them. Raises SizeChosen: the outcome. Raises
    StageError: no size fits, or the weights are not sharded as the launch says."""
    if trials is None:
        assert isinstance(trainer, MicroBatches), "a trainer of other rows passes its trials"
        trials = RowTrials(trainer)
    context.progress(PHASE)
    trainer.add_callback(WeightsAreSharded(context))
    with cut_by_module(trainer.model, context):
        search.run(trainer, trials)


def _log_up_to(checkpoint: Path | None, context: StageContext, period: int) -> MetricsLog:
    log = MetricsLog(context.content / METRICS)
    if context.is_main:
        log.keep_through(0 if checkpoint is None else checkpoints.step_of(checkpoint) // period)
        context.clock.earlier = float(log.last().get("seconds", 0.0))
        context.trackers.catch_up(log.rows())
    return log


def _newest_checkpoint(context: StageContext) -> Path | None:
    fingerprint = context.spec.fingerprint
    newest = everyones(checkpoints.newest(context.checkpoints, fingerprint=fingerprint) if context.is_main else None)
    checkpoint, expected = newest[0], layout(context)
    if checkpoint is None:
        return None
    if (stored := checkpoints.layout_of(checkpoint)) != expected:  # useless to another number of processes
        raise ConfigError(
            f"{checkpoint.name} contains {stored}, but this launch can only continue from {expected}",
            where="launch",
            remedy=f"use the same launch as before, or delete {checkpoint.parent} to train the stage again",
        )
    return checkpoint


def usage(context: StageContext) -> dict[str, float]:
    """Seconds of all attempts, and this process's peak memory in bytes, in the whole stage and in its phases; the peak
    of an engine that the stage started; and the size of micro-batches if the stage chose it."""
    context.peaks.end()
    unit = 1 if sys.platform == "darwin" else 1024
    whole = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    by_phase = context.peaks.resident
    metrics = {"seconds": context.clock.seconds(), PEAK: max(whole, *by_phase.values(), 0.0)}
    metrics |= {f"{PEAK}/{phase}": peak for phase, peak in by_phase.items()}
    if context.peaks.engine is not None:
        metrics[ENGINE_PEAK] = context.peaks.engine
    if context.chosen_tokens is not None:
        metrics[USAGE] = float(context.chosen_tokens)
    if context.device.type == "cuda":
        allocated = context.peaks.allocated
        metrics[GPU_PEAK] = max(allocated.values(), default=0.0)
        metrics |= {f"{GPU_PEAK}/{phase}": peak for phase, peak in allocated.items()}
    return metrics


def fresh_folder(context: StageContext, name: str) -> Any:
    """An empty folder inside the content of the artifact."""
    folder = context.content / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
