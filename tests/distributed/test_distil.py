"""A student that several processes train, beside a teacher that is whole on each, is the student of one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.launch import Sharding
from alignment.config.model import AdapterConfig
from alignment.core.artifacts import verify
from alignment.job import StageSpec
from alignment.stages.distil.kind import Method
from tests.chained import LORA
from tests.distributed.test_sharding import alike, needs_deepspeed, run_on, weights
from tests.generating import FULL, distil_spec
from tests.oracles.close import close

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
    alone = run_on(spec_in(tmp_path / "alone", adapter, Sharding.none), 1)
    together = run_on(spec_in(tmp_path / "together", adapter, sharding))
    close(figures(together.artifact), figures(alone.artifact), atol=1e-4, rtol=1e-4)
    alike(weights(together.artifact), weights(alone.artifact), atol=1e-5)
    metrics = [verify(spec.artifact, content=True).metrics for spec in (alone, together)]
    assert metrics[0].keys() == metrics[1].keys()
    close(list(metrics[1].values()), list(metrics[0].values()), atol=1e-4, rtol=1e-4)
    assert (together.artifact / "distillation.json").is_file()


@needs_deepspeed
def test_sequence_level_distillation_is_shared_out_too(tmp_path: Path) -> None:
    launches = enumerate((Sharding.none, Sharding.zero3), 1)
    specs = [run_on(spec_in(tmp_path / how.value, FULL, how, method=Method.sequence), size) for size, how in launches]
    alone, together = (figures(spec.artifact, ("loss", "grad_norm")) for spec in specs)
    close(together, alone, atol=1e-4, rtol=1e-4)
