"""Training to the end: from the newest good checkpoint, once, and with every process agreed on which that is."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from alignment.core.errors import ConfigError, NonFiniteError, StageError
from alignment.training import checkpoints
from alignment.training.context import PhasePeaks, StageContext
from alignment.training.optimizer import quiet_arguments
from alignment.training.session import Preempted, fresh_folder, train, usage
from tests.device import backend


class _Line(torch.nn.Module):
    """One weight, and a loss that a step lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"loss": scale * ((x * self.weight).sum(-1) ** 2).mean()}


def _trainer(context: StageContext, *, steps: int = 6, model: torch.nn.Module | None = None) -> Trainer:
    rows = [{"x": torch.tensor([float(n), 1.0])} for n in range(8)]
    arguments = TrainingArguments(
        **quiet_arguments(context),
        max_steps=steps,
        logging_steps=1,
        save_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=2,
    )
    return Trainer(model=_Line() if model is None else model, args=arguments, train_dataset=rows)


def _lines(context: StageContext) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (context.content / "metrics.jsonl").read_text().splitlines()]


def _steps(context: StageContext) -> list[int]:
    return [line["step"] for line in _lines(context)]


def test_a_stage_logs_every_step_and_keeps_two_sealed_checkpoints(context: StageContext) -> None:
    last = train(_trainer(context), context, headline="loss")
    assert _steps(context) == [1, 2, 3, 4, 5, 6]
    assert last["step"] == 6
    assert last["loss"] > 0.0
    assert sorted(path.name for path in context.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert checkpoints.newest(context.checkpoints, fingerprint=context.spec.fingerprint) is not None


def test_a_stage_whose_warm_up_never_ends_is_refused(context: StageContext) -> None:
    trainer = _trainer(context, steps=1)
    trainer.args.warmup_steps = 0.05
    with pytest.raises(ConfigError, match="the warm-up covers all 1 optimiser steps of the stage"):
        train(trainer, context, headline="loss")
    trainer = _trainer(context, steps=2)
    trainer.args.warmup_steps = 0.05
    assert train(trainer, context, headline="loss")["step"] == 2


class _KilledAt(TrainerCallback):
    """Ends the process's work without a word, as a power cut does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("killed", "damaged", "from_step"), [(5, None, 4), (5, 4, 2), (3, None, 2), (1, None, 0)], ids=str
)
def test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have(
    tmp_path: Path, context: StageContext, killed: int, damaged: int | None, from_step: int
) -> None:
    straight = replace(context, spec=replace(context.spec, work=tmp_path / "straight"))
    for folder in (straight.content, straight.checkpoints):
        folder.mkdir(parents=True)
    expected = _trainer(straight)
    train(expected, straight, headline="loss")

    trainer = _trainer(context)
    trainer.add_callback(_KilledAt(killed))
    with pytest.raises(KeyboardInterrupt):
        train(trainer, context, headline="loss")
    if damaged is not None:
        (context.checkpoints / f"checkpoint-{damaged}" / "optimizer.pt").write_bytes(b"")
    slow = [{**line, "seconds": 1000.0 * line["step"]} for line in _lines(context)]
    (context.content / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    resumed = _trainer(context)
    begun: list[int] = []

    class Noted(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            begun.append(state.global_step)

    resumed.add_callback(Noted())
    train(resumed, context, headline="loss")
    assert begun == list(range(from_step, 6))
    assert _steps(context) == [1, 2, 3, 4, 5, 6]
    assert {line["seconds"] // 1000.0 for line in _lines(context)[from_step:]} == {from_step}, "those before count too"
    assert torch.equal(resumed.model.weight, expected.model.weight)


def test_a_stage_that_goes_on_logs_and_saves_as_often_as_it_is_asked_to_now(context: StageContext) -> None:
    trainer = _trainer(context)
    trainer.add_callback(_KilledAt(3))
    with pytest.raises(KeyboardInterrupt):
        train(trainer, context, headline="loss")
    trainer = _trainer(context)
    trainer.args.save_steps, trainer.args.logging_steps = 3, 3
    saved: list[int] = []

    class Noted(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved.append(state.global_step)

    trainer.add_callback(Noted())
    train(trainer, context, headline="loss")
    assert saved == [3, 6]
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
    newest = checkpoints.newest(context.checkpoints, fingerprint=context.spec.fingerprint)
    assert newest == context.checkpoints / "checkpoint-6"


def test_a_gradient_that_is_not_finite_stops_with_the_last_good_checkpoint(context: StageContext) -> None:
    class Breaking(_Line):
        calls = 0

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            self.calls += 1
            return super().forward(x, math.nan if self.calls == 4 else 1.0)

    model = Breaking()
    with pytest.raises(NonFiniteError, match=r"a gradient is not finite at optimiser step 4 \(their norm is nan\)"):
        train(_trainer(context, model=model), context, headline="loss")
    assert bool(torch.isfinite(model.weight).all())
    checkpoint = checkpoints.newest(context.checkpoints, fingerprint=context.spec.fingerprint)
    assert checkpoint == context.checkpoints / "checkpoint-2"


def test_a_loss_that_rises_above_its_ceiling_is_no_result(context: StageContext) -> None:
    class Rising(_Line):
        calls = 0

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            self.calls += 1
            return super().forward(x, 10.0**self.calls)

    with pytest.raises(StageError, match=r"^training diverged: its loss went from"):
        train(_trainer(context, model=Rising()), context, headline="loss", ceiling=0.1)
    last = train(_trainer(context, model=Rising()), context, headline="loss", ceiling=1e9)
    assert last["loss"] > 1e5, "all steps were done before, and the same losses are judged"


@pytest.fixture
def _one_process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, so that the collective calls are made."""
    torch.distributed.init_process_group(backend(), init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
def test_the_choice_of_a_checkpoint_passes_through_the_process_group(context: StageContext) -> None:
    trainer = _trainer(context)
    trainer.add_callback(_KilledAt(3))
    with pytest.raises(KeyboardInterrupt):
        train(trainer, context, headline="loss")
    train(_trainer(context), context, headline="loss")
    assert _steps(context) == [1, 2, 3, 4, 5, 6]


def test_only_the_main_process_sets_checkpoints_aside(context: StageContext) -> None:
    (context.checkpoints / "checkpoint-4").mkdir()
    other = replace(context, rank=1, world_size=2)
    train(_trainer(other), other, headline="loss")
    assert not list(context.checkpoints.glob("quarantine-*"))


def test_shares_of_other_processes_are_not_gone_on_from(context: StageContext) -> None:
    folder = context.checkpoints / "checkpoint-2"
    folder.mkdir()
    (folder / "rank0.pt").write_text("a share")
    checkpoints.seal(folder, fingerprint=context.spec.fingerprint, layout="shares of 2 processes (zero2)")
    with pytest.raises(ConfigError, match=r"checkpoint-2 contains shares of 2 processes \(zero2\), but this launch"):
        train(_trainer(context), context, headline="loss")
    assert folder.is_dir(), "it is of use to a launch like the one before"


def test_usage_has_the_largest_of_the_engines_that_a_stage_started(context: StageContext) -> None:
    assert "peak_engine_bytes" not in usage(context)
    context.peaks.of_engine(2e9)
    context.peaks.of_engine(1e9)
    assert usage(context)["peak_engine_bytes"] == 2e9


def test_a_fresh_folder_is_empty_whatever_an_earlier_attempt_left(context: StageContext) -> None:
    (context.content / "model" / "deep").mkdir(parents=True)
    (context.content / "model" / "deep" / "old").write_text("x")
    folder = fresh_folder(context, "model")
    assert folder == context.content / "model"
    assert list(folder.iterdir()) == []


def test_usage_has_seconds_bytes_and_the_peak_of_each_phase(context: StageContext) -> None:
    context.progress("loading")
    context.progress("training")
    measured = usage(context)
    assert 0.0 < measured["seconds"] < 600.0
    assert 50e6 < measured["peak_rss_bytes"] < 1e12
    by_phase = {name: value for name, value in measured.items() if name.startswith("peak_rss_bytes/")}
    assert [name.partition("/")[2] for name in by_phase] == ["starting", "loading", "training"]
    assert measured["peak_rss_bytes"] >= max(by_phase.values())


LARGE = 300 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_each_phase_has_its_own_peak_and_one_that_returns_keeps_its_highest() -> None:
    peaks = PhasePeaks()
    peaks.begin("small")
    peaks.begin("large")
    block = bytearray(b"x") * LARGE
    del block
    for name in ("small again", "large"):
        peaks.begin(name)
    peaks.end()
    assert peaks.resident["large"] > peaks.resident["small"] + 0.9 * LARGE
    assert peaks.resident["small again"] < peaks.resident["large"] - 0.5 * LARGE
