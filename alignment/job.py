"""What a worker is told: one frozen ``stage.yaml``, written by the driver (docs/design/0001)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.config.launch import Offload, Sharding
from alignment.config.model import Dtype, ModelConfig
from alignment.config.stage import StageConfig
from alignment.config.tracking import TrackingConfig
from alignment.config.typed import stage_from_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInput:
    """Where a reference leads: ``path`` is an artifact's folder, or None for the run's base model."""

    ref: str
    path: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage, resolved. Paths are absolute. Of how it is launched it knows what its processes share out.

    ``extra_data`` holds files beside the main one, by the field that names them: ``{"ptx.data": Path("…")}``.
    """

    run: str
    recipe: str
    stage: str
    config: StageConfig
    model: ModelConfig
    base_path: Path
    inputs: dict[str, StageInput]
    arms: dict[str, StageInput]
    data_path: Path
    fingerprint: str
    identity: dict[str, Any]
    input_fingerprints: dict[str, str]
    artifact: Path
    work: Path
    run_folder: Path
    seed: int
    tracking: TrackingConfig
    git_commit: str
    extra_data: dict[str, Path] = field(default_factory=dict)
    sharding: Sharding = Sharding.none
    offload: Offload = Offload.none


def read_spec(path: Path) -> StageSpec:
    """Reads and types a ``stage.yaml``."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return StageSpec(
        config=stage_from_plain(raw["config"]),
        model=ModelConfig(
            source=raw["model"]["source"],
            dtype=Dtype(raw["model"]["dtype"]),
            chat_template=raw["model"].get("chat_template"),
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
