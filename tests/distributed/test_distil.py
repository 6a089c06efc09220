"""A student that several processes train, beside a teacher that is whole on each, is the student of one process."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.adapter import AdapterConfig
from alignment.config.launch import Sharding
from alignment.core.artifacts import verify
from alignment.job import StageSpec
from alignment.stages.distil.config import Method
from tests.chained import LORA
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs, weights
from tests.generating import FULL, distil_spec
from tests.oracles.close import close

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
FIGURES = ("loss", "grad_norm", "acceptance", "same_top", "num_tokens")


def spec_in(folder: Path, adapter: AdapterConfig, sharding: Sharding, **changes: Any) -> StageSpec:
    """Two whole batches of eight of the 16 rows; an optimiser that does not blow up what is only rounding."""
    optim = {"batch_size": 8, "adam_eps": 1e-2, "max_steps": 2}
    settings = {"completions_per_prompt": 2, "eval_fraction": 1 / 3, "timed_prompts": 1, "optim": optim}
    return replace(distil_spec(folder, adapter=adapter, **{**settings, **changes}), sharding=sharding)


def figures(artifact: Path, names: tuple[str, ...] = FIGURES) -> torch.Tensor:
    rows = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[row[name] for name in names] for row in rows])


@needs_deepspeed
@pytest.mark.parametrize(
    ("adapter", "sharding"),
    [(FULL, Sharding.none), (LORA, Sharding.zero3), (FULL, Sharding.fsdp)],
    ids=["full-ddp", "lora-zero3", "full-fsdp"],
)
def test_two_processes_train_the_student_of_one(tmp_path: Path, adapter: AdapterConfig, sharding: Sharding) -> None:
    alone = spec_in(tmp_path / "alone", adapter, Sharding.none)
    assert on_processes(alone, world_size=1) == [0], logs(alone)
    together = spec_in(tmp_path / "together", adapter, sharding)
    assert on_processes(together) == [0, 0], logs(together)
    close(figures(together.artifact), figures(alone.artifact), atol=1e-4, rtol=1e-4)
    expected, trained = weights(alone.artifact), weights(together.artifact)
    assert expected.keys() == trained.keys()
    for name, held in trained.items():
        close(held, expected[name], atol=1e-5)
    metrics = [verify(spec.artifact, content=True).metrics for spec in (alone, together)]
    assert metrics[0].keys() == metrics[1].keys()
    close(list(metrics[1].values()), list(metrics[0].values()), atol=1e-4, rtol=1e-4)
    assert (together.artifact / "distillation.json").is_file()


@needs_deepspeed
def test_sequence_level_distillation_is_shared_out_too(tmp_path: Path) -> None:
    artifacts = []
    for world_size, sharding in ((1, Sharding.none), (2, Sharding.zero3)):
        spec = spec_in(tmp_path / sharding.value, FULL, sharding, method=Method.sequence)
        assert on_processes(spec, world_size=world_size) == [0] * world_size, logs(spec)
        artifacts.append(spec.artifact)
    alone, together = (figures(artifact, ("loss", "grad_norm")) for artifact in artifacts)
    close(together, alone, atol=1e-4, rtol=1e-4)
