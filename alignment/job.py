"""What a worker is told: one frozen ``stage.yaml``, written by the driver (docs/design/0001)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig, SourceConfig
from alignment.config.launch import Offload, Sharding
from alignment.config.model import ModelConfig
from alignment.config.stage import StageConfig
from alignment.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInput:
    """Where a reference leads: ``path`` is an artifact's folder, or None for the run's base model."""

    ref: str
    path: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage, resolved. Paths are absolute. Of how it is launched it knows what its processes share out.

    ``produces`` is the kind of artifact that it makes.
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
    produces: str = ""

    @property
    def adapter(self) -> AdapterConfig | None:
        """How the stage changes the weights; None for one that trains nothing."""
        adapter = getattr(self.config, "adapter", None)
        return adapter if isinstance(adapter, AdapterConfig) else None

    @property
    def made_rows(self) -> dict[str, StageInput]:
        """The results of other stages whose rows this stage reads, by the field of the reference."""
        named = [f"{field}.source" for field in ("data", *self.extra_data)]
        return {name: self.inputs[name] for name in named if name in self.inputs}

    def sources(self, data: DataConfig, field: str) -> list[tuple[SourceConfig, Path]]:
        """The source of ``data``, which the stage has as ``field``, and those that are mixed in, with their files."""
        own = self.data_path if field == "data" else self.extra_data[field]
        mixed = [(part, self.extra_data[f"{field}.mix[{number}]"]) for number, part in enumerate(data.mix)]
        return [(data, own), *mixed]
