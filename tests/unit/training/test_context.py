"""Folders, randomness by name, progress, batches split over devices, and the trainer's arguments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from alignment.config.model import Dtype, ModelConfig
from alignment.config.optim import OptimConfig, Schedule
from alignment.core.errors import ConfigError
from alignment.records.worker import Progress
from alignment.stages.sft.config import SftConfig
from alignment.training.context import StageContext
from alignment.training.trainer_arguments import common_arguments, optimizer_arguments, quiet_arguments, share_of
from tests.tiny import tiny_spec

NAMES_OF_SCHEDULES = {
    Schedule.constant: "constant_with_warmup",
    Schedule.linear: "linear",
    Schedule.cosine: "cosine",
}
"""As transformers knows them."""


def _context(folder: Path, *, rank: int = 0, world_size: int = 1, **changes: object) -> StageContext:
    return StageContext(spec=tiny_spec(folder, SftConfig(), **changes), rank=rank, world_size=world_size)


def test_seeds_depend_on_the_seed_the_stage_the_name_and_the_numbers(tmp_path: Path) -> None:
    context = _context(tmp_path)
    others = [
        context.seed("sampling"),
        context.seed("sampling", 0),
        context.seed("sampling", 1),
        context.seed("sampling", 1, 1),
        context.seed("sampling", 11),
        context.seed("prompts", 0),
        _context(tmp_path, seed=1).seed("sampling", 0),
        _context(tmp_path, stage="other").seed("sampling", 0),
    ]
    assert len(set(others)) == len(others)
    assert context.seed("sampling", 1) == _context(tmp_path / "elsewhere", rank=1, world_size=2).seed("sampling", 1)


def test_generators_of_one_name_draw_the_same_numbers(tmp_path: Path) -> None:
    context = _context(tmp_path)
    draws = [torch.rand(4, generator=context.generator("sampling", update)) for update in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_progress_is_one_whole_file_that_the_main_process_writes(tmp_path: Path) -> None:
    context = _context(tmp_path)
    context.progress("training", 12, 57, loss=1.83)
    path = context.spec.work / "progress.json"
    whole = {"phase": "training", "step": 12, "total": 57, "figures": {"loss": 1.83}, "version": 1}
    assert json.loads(path.read_text()) == whole
    dataclasses.replace(context, rank=1, world_size=2).progress("saving")
    assert json.loads(path.read_text())["phase"] == "training"
    context.progress("saving")
    assert Progress.read(context.spec.work) == Progress(phase="saving")
    assert [p.name for p in context.spec.work.glob("*progress*")] == ["progress.json"]


def test_a_batch_that_does_not_divide_by_the_processes_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        share_of(10, 4)
    assert str(caught.value) == (
        "optim.batch_size: a global batch of 10 is not divisible by 4 processes\n"
        "  → choose a multiple of 4, or another launch.num_processes"
    )


@pytest.mark.parametrize("schedule", Schedule)
def test_every_setting_of_the_optimiser_reaches_the_trainer(tmp_path: Path, schedule: Schedule) -> None:
    context = _context(tmp_path, model=ModelConfig(source="path:tiny", dtype=Dtype.bfloat16))
    optim = OptimConfig(
        lr=3e-4,
        batch_size=12,
        epochs=2.5,
        max_steps=7,
        schedule=schedule,
        warmup_ratio=0.25,
        weight_decay=0.125,
        adam_eps=1e-6,
        max_grad_norm=0.5,
        activation_checkpointing=True,
    )
    arguments = common_arguments(optim, context, log_every=3, save_every=9)
    expected = {
        "per_device_train_batch_size": 12,
        "num_train_epochs": 2.5,
        "max_steps": 7,
        "learning_rate": 3e-4,
        "lr_scheduler_type": NAMES_OF_SCHEDULES[schedule],
        "weight_decay": 0.125,
        "max_grad_norm": 0.5,
        "activation_checkpointing": True,
        "logging_steps": 3,
        "save_steps": 9,
        "bf16": True,
        "warmup_steps": 0.25,
    }
    assert {name: arguments[name] for name in expected} == expected
    of_optimiser = optimizer_arguments(optim, context, torch.nn.Linear(2, 2))[1]
    assert (of_optimiser["lr"], of_optimiser["eps"]) == (3e-4, 1e-6)


def test_the_seed_of_the_trainer_is_that_of_the_run(tmp_path: Path) -> None:
    first, second, again = (quiet_arguments(_context(tmp_path, seed=seed))["seed"] for seed in (0, 1, 0))
    assert first == again != second


def test_no_limit_of_steps_is_told_as_the_trainer_wants_it(tmp_path: Path) -> None:
    arguments = common_arguments(OptimConfig(lr=1e-4), _context(tmp_path), log_every=1, save_every=1)
    assert arguments["max_steps"] == -1
    assert arguments["bf16"] is False
