"""Stages that distil a teacher or sample answers, run as the worker runs them, on tiny models and shipped prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.config.optim import OptimConfig, Schedule
from alignment.config.scoring import ScorerConfig
from alignment.job import StageInput, StageSpec
from alignment.stages.distil.kind import DistilConfig
from alignment.stages.sample.kind import SampleConfig
from alignment.training.context import StageContext
from tests.chained import DATA
from tests.tiny import save_tiny_model, tiny_spec

FULL = AdapterConfig(kind=AdapterKind.full)
BASE = StageInput(ref="base", path=None)


def distil_spec(folder: Path, *, inputs: dict[str, StageInput] | None = None, **changes: Any) -> StageSpec:
    """The first layer of the base of two learns what the base answers to 12 prompts, of which 3 are held out.
    ``changes`` are settings of the stage; ``optim`` changes the optimiser's."""
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
    spec = distil_spec(folder, **changes)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact


LENGTH = ScorerConfig(source="length", target=3)
FINGERPRINT = "f" * 64
"""Of the policy."""


def sample_spec(folder: Path, *, prompts: Sequence[dict[str, Any]] | None = None, **changes: Any) -> StageSpec:
    """Four answers of at most twelve tokens to each of nine prompts, in three parts; ``prompts`` are written rows.
    ``changes`` are settings of the stage, or fields of the spec."""
    if not (folder / "base").exists():
        save_tiny_model(folder / "base")
    file = DATA / "preferences.jsonl"
    if prompts is not None:
        file = folder / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    settings: dict[str, Any] = {
        "policy": "base",
        "reward": None,
        "scorers": [LENGTH],
        "data": DataConfig(source="path:prompts", limit=9),
        "max_prompt_length": 4096,
        "max_new_tokens": 12,
        "ended_only": False,
        "batch_size": 12,
    }
    of_spec = {name: changes.pop(name) for name in ("inputs", "extra_data", "seed") if name in changes}
    defaults = {"inputs": {"policy": StageInput(ref="base", path=None)}, "input_fingerprints": {"policy": FINGERPRINT}}
    return tiny_spec(folder, SampleConfig(**{**settings, **changes}), data_path=file, **{**defaults, **of_spec})


def sampled(folder: Path, **changes: Any) -> Path:
    spec = sample_spec(folder, **changes)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def asked(number: int) -> dict[str, Any]:
    return {"id": f"q{number}", "messages": [{"role": "user", "content": f"What is in box {number}, and whose is it?"}]}
