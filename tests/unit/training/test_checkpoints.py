"""Around a trainer's steps: what is written, where a signal stops, and which checkpoints are continued."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignment.config.launch import Sharding
from alignment.core.errors import StageError
from alignment.records.training import MetricsLog
from alignment.records.worker import Progress
from alignment.training.callbacks import Checkpoints, StepLog, StopOnSignal, WeightsAreSharded
from alignment.training.checkpoints import MANIFEST, newest, rotate, seal, step_of
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
        stop.on_step_end(arguments, _state(step), control)
    assert (stop.asked, stop.stopped) == (asked, False)
    assert (control.should_save, control.should_training_stop) == (False, ends)


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
    for step in (9, 10, 2):
        _checkpoint(tmp_path, step)
    checkpoint = newest(tmp_path, fingerprint=OWN)
    assert checkpoint == tmp_path / "checkpoint-10"
    assert step_of(checkpoint) == 10


@pytest.mark.parametrize("exists", [True, False])
def test_without_checkpoints_there_is_none(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        (folder / "runs").mkdir(parents=True)
        (folder / "checkpoint-best").mkdir()
    assert newest(folder, fingerprint=OWN) is None


def _flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def _list(checkpoint: Path, files: Any) -> None:
    """A manifest of this stage's with another list."""
    (checkpoint / MANIFEST).write_text(json.dumps({"fingerprint": OWN, "files": files}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file cut short": lambda c: (c / "model.safetensors").write_bytes(b"short"),
    "a file that is empty": lambda c: (c / "optimizer" / "rank0.pt").write_text(""),
    "a flipped bit": _flip_a_bit,
    "a missing file": lambda c: (c / "optimizer" / "rank0.pt").unlink(),
    "a manifest cut short": lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:-30]),
    "a manifest of zeros": lambda c: (c / MANIFEST).write_bytes(b"\0" * 80),
    "a manifest that is not UTF-8": lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe"),
    "a manifest with other content": lambda c: (c / MANIFEST).write_text("{}"),
    "a manifest that is a list": lambda c: (c / MANIFEST).write_text("[1, 2]"),
    "a manifest that lists nothing": lambda c: _list(c, {}),
    "a manifest with a list of files": lambda c: _list(c, ["model.safetensors"]),
    "a manifest without sizes": lambda c: _list(c, {"model.safetensors": {}}),
    "a manifest of a file that cannot be": lambda c: _list(c, {"a\0": {"size": 1}}),
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


def test_all_may_be_damaged_and_a_step_be_set_aside_twice(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (4, 8):
            _flip_a_bit(_checkpoint(tmp_path, step))
        assert newest(tmp_path, fingerprint=OWN) is None
    assert _names(tmp_path) == ["quarantine-checkpoint-4", "quarantine-checkpoint-8"]


def test_a_damaged_checkpoint_older_than_a_good_one_is_not_touched(tmp_path: Path) -> None:
    _flip_a_bit(_checkpoint(tmp_path, 4))
    _checkpoint(tmp_path, 8)
    assert newest(tmp_path, fingerprint=OWN) == tmp_path / "checkpoint-8"
    assert _names(tmp_path) == ["checkpoint-4", "checkpoint-8"]


def test_a_seal_lists_every_file_but_itself_and_may_be_renewed(tmp_path: Path) -> None:
    """The trainer may save the same step again: at a signal and at the end."""
    checkpoint = _checkpoint(tmp_path, 4)
    (checkpoint / "model.safetensors").write_bytes(b"written again")
    seal(checkpoint, fingerprint=OWN)
    listed = json.loads((checkpoint / MANIFEST).read_text())
    assert listed["fingerprint"] == OWN
    assert sorted(listed["files"]) == ["model.safetensors", "optimizer/rank0.pt"]
    assert newest(tmp_path, fingerprint=OWN) == checkpoint


def test_rotation_keeps_the_two_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10, 6):
        _checkpoint(tmp_path, step)
    rotate(tmp_path)
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-6"]


def test_rotation_never_counts_what_is_not_sealed(tmp_path: Path) -> None:
    """A half-written newest checkpoint must not push out the last good ones."""
    for step in (2, 4):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 6, sealed=False)
    rotate(tmp_path)
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
