"""Reads the ``stage.yaml`` that a worker is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alignment.config.launch import Offload, Sharding
from alignment.config.model import Dtype, ModelConfig
from alignment.config.tracking import TrackingConfig
from alignment.config.typed import stage_from_plain
from alignment.job import StageInput, StageSpec
from alignment.stages.registry import config_classes, kind_of


def read_spec(path: Path) -> StageSpec:
    """Reads a ``stage.yaml`` into a typed ``StageSpec``."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = stage_from_plain(raw["config"], config_classes())
    return StageSpec(
        config=config,
        produces=kind_of(config).produces,
        model=ModelConfig(
            source=raw["model"]["source"],
            dtype=Dtype(raw["model"]["dtype"]),
            chat_template=raw["model"].get("chat_template"),
            template_options=raw["model"].get("template_options", {}),
        ),
        base_path=Path(raw["base_path"]),
        inputs={name: _input(value) for name, value in raw["inputs"].items()},
        arms={name: _input(value) for name, value in raw["arms"].items()},
        data_path=Path(raw["data_path"]),
        sharding=Sharding(raw["launch"]["sharding"]),
        offload=Offload(raw["launch"]["offload"]),
        extra_data={name: Path(path) for name, path in raw.get("extra_data", {}).items()},
        artifact=Path(raw["artifact"]),
        work=Path(raw["work"]),
        run_folder=Path(raw["run_folder"]),
        recipe=raw["recipe"],
        tracking=TrackingConfig(**raw["tracking"]),
        **{
            name: raw[name]
            for name in ("run", "stage", "fingerprint", "identity", "input_fingerprints", "seed", "git_commit")
        },
    )


def _input(raw: dict[str, Any]) -> StageInput:
    return StageInput(ref=raw["ref"], path=None if raw["path"] is None else Path(raw["path"]))
