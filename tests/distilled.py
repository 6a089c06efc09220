"""A stage in which a student learns from a teacher, run as the worker runs it, on tiny models and shipped prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.config.optim import OptimConfig, Schedule
from alignment.job import StageInput, StageSpec
from alignment.stages.distil.kind import DistilConfig
from alignment.training.context import StageContext
from tests.chained import DATA
from tests.tiny import save_tiny_model, tiny_spec

FULL = AdapterConfig(kind=AdapterKind.full)
BASE = StageInput(ref="base", path=None)


def distil_spec(folder: Path, *, inputs: dict[str, StageInput] | None = None, **changes: Any) -> StageSpec:
    """The first layer of the base of two learns what the base answers to 12 prompts, of which 3 are held out.

    ``changes`` are settings of the stage; ``optim`` changes the optimiser's.
    """
    if not (folder / "base").exists():
        save_tiny_model(folder / "base")
    optim = OptimConfig(lr=1e-2, batch_size=4, micro_batch_tokens=60, warmup_ratio=0.0, schedule=Schedule.constant)
    settings: dict[str, Any] = {
        "init": "base",
        "teacher": "base",
        "layers": 1,
        "adapter": FULL,
        "data": DataConfig(source="path:prompts", limit=12),
        "optim": replace(optim, **changes.pop("optim", {})),
        "max_prompt_length": 4096,
        "max_new_tokens": 8,
        "batch_size": 5,
        "eval_fraction": 0.25,
        "bootstrap_samples": 100,
        "save_every": 1,
    }
    config = DistilConfig(**{**settings, **changes})
    stage_inputs = inputs or {"init": BASE, "teacher": BASE}
    return tiny_spec(folder, config, data_path=DATA / "preferences.jsonl", inputs=stage_inputs)


def distilled(folder: Path, **changes: Any) -> Path:
    """The artifact of the stage; arguments as in ``distil_spec``."""
    spec = distil_spec(folder, **changes)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact
