"""Training to the end: what is written around the steps, where a signal stops it, which checkpoint it goes on from."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from alignment.config.launch import Sharding
from alignment.core.errors import ConfigError, NonFiniteError, StageError
from alignment.records.training import MetricsLog
from alignment.records.worker import Progress
from alignment.training.callbacks import StepLog, StopOnSignal, WeightsAreSharded
from alignment.training.checkpoints import MANIFEST, newest, rotate, seal, step_of
from alignment.training.context import PhasePeaks, StageContext
from alignment.training.session import Preempted, train, usage
from tests.chained import FULL, config_of
from tests.tiny import tiny_spec
from tests.unit.training.conftest import at_step
from tests.unit.training.tracked import Line, line_trainer


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops_at_the_next_exact_step(arguments: TrainingArguments, name: signal.Signals) -> None:
    """After a training a signal does what it did before: held-out pairs, a guard's last look and saving follow, where
    nothing would read a request."""
    heard: list[int] = []
    signal.signal(name, lambda number, _: heard.append(number))
    stop = StopOnSignal(period=4)
    stops = []
    with stop.listening():
        for step in range(1, 13):
            if step == 6:
                os.kill(os.getpid(), name)
            control = TrainerControl()
            stop.on_step_end(arguments, at_step(step), control)
            assert control.should_save == control.should_training_stop
            if control.should_training_stop:
                stops.append(step)
    assert stops[0] == 8
    assert (stop.stopped, stop.asked, heard) == (True, True, [])
    os.kill(os.getpid(), name)
    assert heard == [name]


@pytest.mark.parametrize(
    ("asked", "step", "ends"),
    [
        (False, 1, False),
        (True, 100, False),  # the last step: training ends by itself
        (True, 7, True),  # PPO over its KL budget ends inside an update; a checkpoint would count it as learned
    ],
)
def test_without_a_signal_or_where_training_ends_by_itself_nothing_stops_or_is_saved(
    arguments: TrainingArguments, asked: bool, step: int, ends: bool
) -> None:
    stop, control = StopOnSignal(period=1), TrainerControl(should_training_stop=ends)
    with stop.listening():
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(arguments, at_step(step), control)
    assert (stop.asked, stop.stopped) == (asked, False)
    assert (control.should_save, control.should_training_stop) == (False, ends)


@pytest.mark.parametrize(
    ("period", "taken", "of"),
    [(1, 3, 9), (4, 12, 36), (4, 9, 36)],
    ids=["a step", "an update", "an update that was only sampled"],
)
def test_a_logged_step_goes_to_the_file_the_trackers_and_the_progress_line(
    arguments: TrainingArguments,
    context: StageContext,
    monkeypatch: pytest.MonkeyPatch,
    period: int,
    taken: int,
    of: int,
) -> None:
    sent: list[tuple[int, float]] = []
    monkeypatch.setattr(context.trackers, "log", lambda step, figures: sent.append((step, figures["lr"])))
    log = MetricsLog(context.content / "metrics.jsonl")
    callback = StepLog(context, log, headline="loss", period=period)
    callback.on_train_begin(arguments, at_step(0, of), TrainerControl())
    assert Progress.read(context.spec.work) == Progress(phase="training", step=0, total=9)
    logs = {"loss": 1.5, "learning_rate": 1e-4, "grad_norm": 0.5}
    callback.on_log(arguments, at_step(taken, of), TrainerControl(), logs=logs)
    summary = {"train_runtime": 3.0, "train_loss": 1.0}
    callback.on_log(arguments, at_step(taken, of), TrainerControl(), logs=summary)  # the trainer's own is no step
    seconds = log.last().pop("seconds")
    assert log.last() == {"step": 3, "loss": 1.5, "lr": 1e-4, "grad_norm": 0.5, "seconds": seconds}
    assert 0.0 <= seconds < 600.0
    assert sent == [(3, 1e-4)]
    assert Progress.read(context.spec.work) == Progress(phase="training", step=3, total=9, figures={"loss": 1.5})


@pytest.mark.parametrize("sharding", [Sharding.zero3, Sharding.fsdp])
def test_a_launch_that_shards_weights_ends_if_they_are_whole(
    tmp_path: Path, arguments: TrainingArguments, sharding: Sharding
) -> None:
    spec = tiny_spec(tmp_path, config_of("sft", FULL), sharding=sharding)
    check = WeightsAreSharded(StageContext(spec=spec, rank=0, world_size=2))
    with pytest.raises(StageError, match=rf"whole weights.*\({sharding.value}\)"):
        check.on_train_begin(arguments, at_step(0), TrainerControl(), model=torch.nn.Linear(1, 1))


OWN, FOREIGN = "a" * 64, "b" * 64


def _checkpoint(folder: Path, step: int, *, sealed: bool = True, fingerprint: str = OWN) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "optimizer").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(200)))
    (checkpoint / "optimizer" / "rank0.pt").write_text(f"step {step}")
    if sealed:
        seal(checkpoint, fingerprint=fingerprint)
    return checkpoint


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_sealed_checkpoint_is_taken_by_number_not_by_name(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere", fingerprint=OWN) is None
    (tmp_path / "runs").mkdir(parents=True)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest(tmp_path, fingerprint=OWN) is None
    for step in (9, 10, 2):
        _checkpoint(tmp_path, step)
    checkpoint = newest(tmp_path, fingerprint=OWN)
    assert checkpoint == tmp_path / "checkpoint-10"
    assert step_of(checkpoint) == 10


def _flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def _list(checkpoint: Path, files: Any) -> None:
    (checkpoint / MANIFEST).write_text(json.dumps({"fingerprint": OWN, "files": files}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file cut short": lambda c: (c / "model.safetensors").write_bytes(b"short"),
    "a flipped bit": _flip_a_bit,
    "a manifest cut short": lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:-30]),
    "a manifest with other content": lambda c: (c / MANIFEST).write_text("{}"),
    "a manifest that lists nothing": lambda c: _list(c, {}),
    "a manifest without sizes": lambda c: _list(c, {"model.safetensors": {}}),
    "a manifest of a file outside": lambda c: _list(c, {"/etc/passwd": {"size": Path("/etc/passwd").stat().st_size}}),
    "another stage's": lambda c: seal(c, fingerprint=FOREIGN),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_trusted_is_set_aside_and_the_older_one_taken(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = _checkpoint(tmp_path, 4)
    DAMAGES[damage](_checkpoint(tmp_path, 8))
    assert newest(tmp_path, fingerprint=OWN) == older
    assert _names(tmp_path) == ["checkpoint-4", "quarantine-checkpoint-8"]
    assert "checkpoint-8" in caplog.text


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    _checkpoint(tmp_path, 8)
    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        newest(tmp_path, fingerprint=OWN)
    assert _names(tmp_path) == ["checkpoint-8"]


def test_a_checkpoint_that_was_never_finished_is_removed(tmp_path: Path) -> None:
    older = _checkpoint(tmp_path, 4)
    _checkpoint(tmp_path, 8, sealed=False)
    assert newest(tmp_path, fingerprint=OWN) == older
    assert _names(tmp_path) == ["checkpoint-4"]


def test_a_seal_lists_every_file_but_itself_and_may_be_renewed(tmp_path: Path) -> None:
    """The trainer may save the same step again: at a signal and at the end."""
    checkpoint = _checkpoint(tmp_path, 4)
    (checkpoint / "model.safetensors").write_bytes(b"written again")
    seal(checkpoint, fingerprint=OWN)
    listed = json.loads((checkpoint / MANIFEST).read_text())
    assert listed["fingerprint"] == OWN
    assert sorted(listed["files"]) == ["model.safetensors", "optimizer/rank0.pt"]
    assert newest(tmp_path, fingerprint=OWN) == checkpoint


def test_rotation_keeps_the_two_newest_and_never_counts_what_is_not_sealed(tmp_path: Path) -> None:
    """A half-written newest checkpoint must not push out the last good ones."""
    for step in (2, 4, 10, 6):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 12, sealed=False)
    rotate(tmp_path)
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-6"]


def _trainer(context: StageContext, *, steps: int = 6, model: torch.nn.Module | None = None) -> Trainer:
    return line_trainer(context, steps=steps, save_every=2, model=model)


def _lines(context: StageContext) -> list[dict[str, Any]]:
    return MetricsLog(context.content / "metrics.jsonl").rows()


def _steps(context: StageContext) -> list[int]:
    return [line["step"] for line in _lines(context)]


def test_a_stage_logs_every_step_and_keeps_two_sealed_checkpoints(context: StageContext) -> None:
    last = train(_trainer(context), context, headline="loss")
    assert _steps(context) == [1, 2, 3, 4, 5, 6]
    assert last["step"] == 6
    assert last["loss"] > 0.0
    assert _names(context.checkpoints) == ["checkpoint-4", "checkpoint-6"]
    best = newest(context.checkpoints, fingerprint=context.spec.fingerprint)
    assert best == context.checkpoints / "checkpoint-6"


def test_a_stage_whose_warm_up_never_ends_is_refused(context: StageContext) -> None:
    trainer = _trainer(context, steps=1)
    trainer.args.warmup_steps = 0.05
    with pytest.raises(ConfigError, match="all 1 optimiser steps"):
        train(trainer, context, headline="loss")
    trainer = _trainer(context, steps=2)
    trainer.args.warmup_steps = 0.05
    assert train(trainer, context, headline="loss")["step"] == 2


class _KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def _train_until(step: int, context: StageContext) -> None:
    trainer = _trainer(context)
    trainer.add_callback(_KilledAt(step))
    with pytest.raises(KeyboardInterrupt):
        train(trainer, context, headline="loss")


class Noted(TrainerCallback):
    def __init__(self) -> None:
        self.begun: list[int] = []
        self.saved: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved.append(state.global_step)


@pytest.mark.parametrize(("killed", "damaged", "from_step"), [(5, None, 4), (5, 4, 2), (1, None, 0)], ids=str)
def test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have(
    tmp_path: Path, context: StageContext, killed: int, damaged: int | None, from_step: int
) -> None:
    straight = replace(context, spec=replace(context.spec, work=tmp_path / "straight"))
    for folder in (straight.content, straight.checkpoints):
        folder.mkdir(parents=True)
    expected = _trainer(straight)
    train(expected, straight, headline="loss")

    _train_until(killed, context)
    if damaged is not None:
        (context.checkpoints / f"checkpoint-{damaged}" / "optimizer.pt").write_bytes(b"")
    slow = [{**line, "seconds": 1000.0 * line["step"]} for line in _lines(context)]
    (context.content / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    resumed, events = _trainer(context), Noted()
    resumed.add_callback(events)
    train(resumed, context, headline="loss")
    assert events.begun == list(range(from_step, 6))
    assert _steps(context) == [1, 2, 3, 4, 5, 6]
    assert {line["seconds"] // 1000.0 for line in _lines(context)[from_step:]} == {from_step}, "those before count too"
    assert torch.equal(resumed.model.weight, expected.model.weight)


def test_a_stage_that_goes_on_logs_and_saves_as_often_as_it_is_asked_to_now(context: StageContext) -> None:
    _train_until(3, context)
    trainer, events = _trainer(context), Noted()
    trainer.args.save_steps, trainer.args.logging_steps = 3, 3
    trainer.add_callback(events)
    train(trainer, context, headline="loss")
    assert events.saved == [3, 6]
    assert _steps(context) == [1, 2, 3, 6]


@pytest.mark.parametrize("steps", [6, 8])
def test_a_stage_killed_after_its_last_step_is_not_trained_further(context: StageContext, steps: int) -> None:
    """In the middle of a pass over the data, and at its end."""
    first = _trainer(context, steps=steps)
    last = train(first, context, headline="loss")
    again = _trainer(context, steps=steps)
    assert train(again, context, headline="loss") == last
    assert torch.equal(again.model.weight, first.model.weight)
    assert _steps(context) == list(range(1, steps + 1))


def test_a_request_to_stop_in_the_last_step_comes_after_its_checkpoint(context: StageContext) -> None:
    class Asked(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                signal.raise_signal(signal.SIGTERM)

    trainer = _trainer(context)
    trainer.add_callback(Asked())
    with pytest.raises(Preempted) as stop:
        train(trainer, context, headline="loss")
    assert (stop.value.saved, stop.value.trained) == (False, True)
    assert newest(context.checkpoints, fingerprint=context.spec.fingerprint) == context.checkpoints / "checkpoint-6"


class Scaled(Line):
    def __init__(self, factor: Callable[[int], float]) -> None:
        super().__init__()
        self._factor, self._calls = factor, 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self._calls += 1
        return {"loss": self._factor(self._calls) * super().forward(x)["loss"]}


def test_a_gradient_that_is_not_finite_stops_with_the_last_good_checkpoint(context: StageContext) -> None:
    model = Scaled(lambda calls: math.nan if calls == 4 else 1.0)
    with pytest.raises(NonFiniteError, match=r"gradient is not finite at optimiser step 4 \(their norm is nan\)"):
        train(_trainer(context, model=model), context, headline="loss")
    assert bool(torch.isfinite(model.weight).all())
    checkpoint = newest(context.checkpoints, fingerprint=context.spec.fingerprint)
    assert checkpoint == context.checkpoints / "checkpoint-2"


def test_a_loss_that_rises_above_its_ceiling_is_no_result(context: StageContext) -> None:
    def rising() -> Scaled:
        return Scaled(lambda calls: 10.0**calls)

    with pytest.raises(StageError, match="diverged"):
        train(_trainer(context, model=rising()), context, headline="loss", ceiling=0.1)
    last = train(_trainer(context, model=rising()), context, headline="loss", ceiling=1e9)
    assert last["loss"] > 1e5, "all steps were done before, and the same losses are judged"


def test_shares_of_other_processes_are_not_gone_on_from(context: StageContext) -> None:
    folder = context.checkpoints / "checkpoint-2"
    folder.mkdir()
    (folder / "rank0.pt").write_text("a share")
    seal(folder, fingerprint=context.spec.fingerprint, layout="shares of 2 processes (zero2)")
    with pytest.raises(ConfigError, match=r"checkpoint-2 contains shares of 2 processes \(zero2\)"):
        train(_trainer(context), context, headline="loss")
    assert folder.is_dir(), "it is of use to a launch like the one before"


def test_usage_has_seconds_bytes_and_the_peak_of_each_phase_and_of_the_largest_engine(context: StageContext) -> None:
    context.progress("loading")
    context.progress("training")
    measured = usage(context)
    assert 0.0 < measured["seconds"] < 600.0
    assert 50e6 < measured["peak_rss_bytes"] < 1e12
    by_phase = {name: value for name, value in measured.items() if name.startswith("peak_rss_bytes/")}
    assert [name.partition("/")[2] for name in by_phase] == ["starting", "loading", "training"]
    assert measured["peak_rss_bytes"] >= max(by_phase.values())
    assert "peak_engine_bytes" not in measured
    context.peaks.of_engine(2e9)
    context.peaks.of_engine(1e9)
    assert usage(context)["peak_engine_bytes"] == 2e9


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_each_phase_has_its_own_peak_and_one_that_returns_keeps_its_highest() -> None:
    large, peaks = 300 << 20, PhasePeaks()
    peaks.begin("small")
    peaks.begin("large")
    block = bytearray(b"x") * large
    del block
    for name in ("small again", "large"):
        peaks.begin(name)
    peaks.end()
    assert peaks.resident["large"] > peaks.resident["small"] + 0.9 * large
    assert peaks.resident["small again"] < peaks.resident["large"] - 0.5 * large
