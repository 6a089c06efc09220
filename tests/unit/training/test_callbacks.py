"""Around a trainer's steps: what is written, where a signal stops, what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignment.config.launch import Sharding
from alignment.core.errors import StageError
from alignment.records.step_log import MetricsLog
from alignment.records.worker import Progress
from alignment.training.callbacks import Checkpoints, StepLog, StopOnSignal, WeightsAreSharded
from alignment.training.checkpoints import newest
from alignment.training.context import StageContext
from tests.chained import FULL, config_of
from tests.tiny import tiny_spec


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    """What a trainer hands to its callbacks."""
    return TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to="none")


def _state(step: int, max_steps: int = 100) -> TrainerState:
    state = TrainerState()
    state.global_step, state.max_steps = step, max_steps
    return state


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops_at_the_next_exact_step(arguments: TrainingArguments, name: signal.Signals) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # not Python's own handler: a worker has replaced it
    stop = StopOnSignal(period=4)
    stops = []
    with stop.listening():
        for step in range(1, 13):
            if step == 6:
                os.kill(os.getpid(), name)
            control = TrainerControl()
            stop.on_step_end(arguments, _state(step), control)
            assert control.should_save == control.should_training_stop
            if control.should_training_stop:
                stops.append(step)
    assert stops[0] == 8
    assert stop.stopped


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_after_a_training_a_signal_does_what_it_did_before(name: signal.Signals) -> None:
    """Held-out pairs, a guard's last look and saving follow, where nothing would read a request."""
    heard: list[int] = []
    signal.signal(name, lambda number, _: heard.append(number))
    stop = StopOnSignal(period=1)
    with stop.listening():
        os.kill(os.getpid(), name)
    assert (stop.asked, heard) == (True, [])
    os.kill(os.getpid(), name)
    assert heard == [name]


def test_without_a_signal_nothing_stops(arguments: TrainingArguments) -> None:
    stop, control = StopOnSignal(period=1), TrainerControl()
    stop.on_step_end(arguments, _state(1), control)
    assert (stop.stopped, control.should_save, control.should_training_stop) == (False, False, False)


def test_a_signal_during_the_last_step_ends_no_training_that_ends_by_itself(arguments: TrainingArguments) -> None:
    stop, control = StopOnSignal(period=1), TrainerControl()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(arguments, _state(100), control)
    assert stop.asked
    assert not stop.stopped
    assert not control.should_training_stop


def test_a_signal_when_the_stage_ends_by_itself_saves_nothing(arguments: TrainingArguments) -> None:
    """PPO over its KL budget ends inside an update, where a checkpoint would count an update that was not learned."""
    stop, control = StopOnSignal(period=1), TrainerControl(should_training_stop=True)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(arguments, _state(7), control)
    assert (stop.stopped, control.should_save) == (False, False)


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "taken", "of", "step", "total"),
    [(1, 3, 9, 3, 9), (4, 12, 36, 3, 9), (4, 9, 36, 3, 9)],
    ids=["a step", "an update", "an update that was only sampled"],
)
def test_a_logged_step_goes_to_the_file_the_trackers_and_the_progress_line(
    arguments: TrainingArguments,
    context: StageContext,
    monkeypatch: pytest.MonkeyPatch,
    period: int,
    taken: int,
    of: int,
    step: int,
    total: int,
) -> None:
    sent: list[tuple[int, float]] = []
    monkeypatch.setattr(context.trackers, "log", lambda step, figures: sent.append((step, figures["lr"])))
    log = MetricsLog(context.content / "metrics.jsonl")
    callback = StepLog(context, log, headline="loss", period=period)
    logs = {"loss": 1.5, "learning_rate": 1e-4, "grad_norm": 0.5}
    callback.on_log(arguments, _state(taken, of), TrainerControl(), logs=logs)
    seconds = log.last().pop("seconds")
    assert log.last() == {"step": step, "loss": 1.5, "lr": 1e-4, "grad_norm": 0.5, "seconds": seconds}
    assert 0.0 <= seconds < 600.0
    assert sent == [(step, 1e-4)]
    expected = Progress(phase="training", step=step, total=total, figures={"loss": 1.5})
    assert Progress.read(context.spec.work) == expected


@pytest.mark.parametrize("logs", [{}, None, {"train_runtime": 3.0, "train_loss": 1.0}])
def test_the_trainers_closing_summary_is_no_step(
    arguments: TrainingArguments, context: StageContext, logs: dict[str, float] | None
) -> None:
    log = MetricsLog(context.content / "metrics.jsonl")
    callback = StepLog(context, log, headline="loss", period=1)
    callback.on_log(arguments, _state(9, 9), TrainerControl(), logs=logs)
    assert log.last() == {}


def test_the_length_of_the_work_is_shown_before_its_first_step(
    arguments: TrainingArguments, context: StageContext
) -> None:
    callback = StepLog(context, MetricsLog(context.content / "metrics.jsonl"), headline="loss", period=1)
    callback.on_train_begin(arguments, _state(0, 9), TrainerControl())
    assert Progress.read(context.spec.work) == Progress(phase="training", step=0, total=9)


def test_a_saved_checkpoint_is_sealed_and_the_oldest_removed(
    arguments: TrainingArguments, context: StageContext
) -> None:
    for step in (1, 2, 3):
        folder = context.checkpoints / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        Checkpoints(context).on_save(arguments, _state(step), TrainerControl(), model=torch.nn.Linear(1, 1))
    assert sorted(path.name for path in context.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    checkpoint = newest(context.checkpoints, fingerprint=context.spec.fingerprint)
    assert checkpoint == context.checkpoints / "checkpoint-3"


@pytest.mark.parametrize("sharding", [Sharding.zero3, Sharding.fsdp])
def test_a_launch_that_shards_weights_ends_if_they_are_whole(
    tmp_path: Path, arguments: TrainingArguments, sharding: Sharding
) -> None:
    spec = tiny_spec(tmp_path, config_of("sft", FULL), sharding=sharding)
    check = WeightsAreSharded(StageContext(spec=spec, rank=0, world_size=2))
    with pytest.raises(StageError, match=rf"each process has the whole weights.*\({sharding.value}\)"):
        check.on_train_begin(arguments, _state(0), TrainerControl(), model=torch.nn.Linear(1, 1))
